"""Requests that can be sent to an engine at once: no waiting, no translation, nothing to look up. They are served without a task.

Whatever else comes up (no free slot, a rule of the config, a dialect that needs repair, an engine that is lost) is the ordinary
way's: a request either never begins here, or goes on there with all that is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from offloadd.errors import RequestError
from offloadd.proxy import bodies, headers, routing
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects import openai
from offloadd.proxy.dialects.base import Object
from offloadd.proxy.dialects.multipart import is_form
from offloadd.proxy.errands import Client, Errand, Means, Order
from offloadd.proxy.gateway import FORWARDED
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.media import may_point
from offloadd.proxy.plain_errand import PlainErrand
from offloadd.proxy.pool import Pool
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from offloadd.state.judged import Judged


@dataclass(slots=True)
class _Fit:
    """Whether all instances of a model can be asked without more ado, as long as they are the same."""

    turn: int
    """In which that was last made sure of."""
    spec: ModelSpec
    hosts: Sequence[Host]
    paths: frozenset[str]
    """That all of them answer to the letter; empty when one of them needs help."""
    only_streams: bool
    """Whether one of them can be interrupted only while it streams."""


class Express:
    """Begins what can begin at once."""

    def __init__(
        self, names: Callable[[], routing.Names], book: LeaseBook, pool: Pool, accounts: Accounts, new_id: Callable[[], str]
    ) -> None:
        self._names = names
        self._means = Means(book, pool, accounts)
        self._new_id = new_id
        self._fits: dict[ModelName, _Fit] = {}
        self._looked = 0
        """The turn in which the next two were looked up."""
        self._present = names()
        self._suspicious = False

    def take(self, judged: Judged, body: bytes, client: Client) -> Errand | PlainErrand | None:
        """Send the request; None, with nothing done, when it has to go the ordinary way."""
        try:
            head = routing.read_head(body)
        except RequestError:
            return None
        means = self._means
        turn = means.pool.turn.number
        if turn != self._looked or not turn:
            self._looked, self._present, self._suspicious = turn, self._names(), bool(means.book.suspects)
        names = self._present
        spec = names.default if head.model is None else names.models.get(head.model)
        if spec is None or spec.request or head.backend is not None or spec.queue.hedge_after is not None:
            return None
        fit = self._fits.get(spec.name)
        if fit is None or fit.turn != turn or not turn or fit.spec is not spec:
            fit = self._fit(spec, turn)
        if not self._may_pass(judged, body, head, fit):
            return None
        collected = None
        if fit.only_streams and not head.stream and (collected := _collectable(judged.path, body)) is None:
            return None
        lease = means.book.grant(spec, head.conversation(spec))
        if lease is None:
            return None
        try:
            return self._send(judged, body, client, lease, head, collected)
        except BaseException:
            means.book.release(lease)
            raise

    def _may_pass(self, judged: Judged, body: bytes, head: routing.Head, fit: _Fit) -> bool:
        """Whether it goes to an engine as it is, and nobody has anything against it."""
        spec = fit.spec
        return (
            judged.path in fit.paths
            and not (head.stream and (head.n or 1) > 1)
            and bool(_onward(judged) if judged.onward is None else judged.onward)
            and not self._suspicious
            and not may_point(body)
            and judged.caller.may_use(spec.name, spec.aliases)
        )

    def _send(
        self, judged: Judged, body: bytes, client: Client, lease: Lease, head: routing.Head, collected: Object | None
    ) -> Errand | PlainErrand:
        """`collected`: what is asked for, where the engine is to answer with a stream that is put together here."""
        means, host = self._means, lease.host
        asked = body if collected is None else msgspec.json.encode(openai.as_stream(collected))
        sent = bodies.readdressed(asked, head, host.api)
        order = Order(judged, body, sent, client, lease, self._new_id(), means.accounts.now())
        if not head.stream and collected is None and (kept := means.pool.idle(host)) is not None:
            plain = PlainErrand(means, order, kept)
            plain.send(kept)
            return plain
        errand = Errand(means, order)
        errand.begin(None if collected is None else openai.Collector(judged.path, head.n or 1), stream=bool(head.stream))
        return errand

    def _fit(self, spec: ModelSpec, turn: int) -> _Fit:
        hosts = self._means.book.hosts(spec.name)
        known = self._fits.get(spec.name)
        if known is None or known.hosts is not hosts or known.spec is not spec:
            if len(self._fits) > len(self._present.models):  # some are of models that are gone
                self._fits.clear()
            exact = all(host.api.exact and host.api.wire is None for host in hosts)
            paths = frozenset.intersection(*(host.api.paths for host in hosts)) if hosts and exact else frozenset[str]()
            known = self._fits[spec.name] = _Fit(turn, spec, hosts, paths, any(host.cancels_only_streams for host in hosts))
        known.turn = turn
        return known


def _collectable(path: str, body: bytes) -> Object | None:
    """What a body asks for, if the answer to that can be put together from a stream."""
    try:
        fields = routing.read_object(body)
    except RequestError:
        return None  # the ordinary way says what is wrong with it
    return fields if openai.can_collect(path, fields) else None


def _onward(judged: Judged) -> bytes:
    """Empty where more than routing fields have to be looked at: a form, or any path that is not merely forwarded."""
    kind = headers.field(judged.fields, b"content-type").decode("latin-1")
    plain = judged.path in FORWARDED and not is_form(kind)
    judged.onward = headers.onward(judged.fields, as_json=True) if plain else b""
    return judged.onward
