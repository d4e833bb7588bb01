"""The account of one request, kept while it is served and closed once, with exactly one fate."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable

import msgspec
from aiohttp import web

from offloadd.clock import Clock
from offloadd.errors import OffloaddError, RequestError
from offloadd.events import EventKind, about
from offloadd.proxy.downstream import Stream
from offloadd.proxy.lease import Lease
from offloadd.proxy.taps import Tap, Tokens, tokens_in
from offloadd.state.ids import ModelName
from offloadd.state.served import Fate, Served
from offloadd.units import Instant, Seconds

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
SOON = 0.02
"""Seconds until a request that is over is accounted for, if nobody asks before."""
MOST_OPEN = 256
"""Requests that may wait for that."""
LARGE = 16 * 1024
"""Bytes of an answer that is not kept for it."""
Done = Callable[[Served], None]


class Account:
    """What is known of one request so far. Handlers fill it in; `Accounts` closes it."""

    __slots__ = (
        "arrived",
        "broken",
        "closed",
        "dialect",
        "early",
        "granted",
        "hedged",
        "lease",
        "lost",
        "model",
        "moved",
        "path",
        "reason",
        "sent",
        "size_in",
        "streamed",
        "tap",
        "turned_away",
    )

    def __init__(self, path: str, dialect: str, clock: Clock, arrived: Instant) -> None:
        self.path = path
        self.dialect = dialect
        self.arrived = arrived
        self.tap = Tap(clock)
        self.model: ModelName | None = None
        self.lease: Lease | None = None
        self.granted: Instant | None = None
        self.early: Stream | None = None
        """The answer, where it has begun while the request waits for an instance."""
        self.sent = False
        """Whether an engine had it."""
        self.broken = False
        """Whether the answer broke off."""
        self.lost: RequestError | None = None
        """How a first try came to nothing; for the reason that the answer gives."""
        self.moved = False
        """Whether it has gone to another instance already: it does so once."""
        self.hedged = ""
        """`won` or `lost`, where a second instance was asked too: by whether the answer is that one's."""
        self.turned_away = False
        """Whether it was refused within an answer that had begun while it waited."""
        self.closed = False
        self.streamed = False
        self.size_in = 0
        self.reason = ""

    def grant(self, lease: Lease, size: int) -> None:
        """It has an instance now, and a body of this size goes there."""
        self.lease = lease
        self.model = lease.host.instance.model
        self.size_in = size
        self.granted = Instant(self.arrived + lease.waited)


ACCOUNT: web.RequestKey[Account] = web.RequestKey("account", Account)


class Accounts:
    """Opens the account of every inference request and tells what became of it."""

    def __init__(self, clock: Clock, done: Done, who: Callable[[], str] = str) -> None:
        """`who` gives the name of the API key that the present request came with."""
        self._clock = clock
        self.now = clock.now
        """By the clock that spans are measured with."""
        self._done = done
        self._who = who
        self._dialects: dict[str, str] = {}
        self._ended: deque[_Ended] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def know(self, dialect: str, *paths: str) -> None:
        """Requests on these routes, by their patterns, are inference."""
        self._dialects.update(dict.fromkeys(paths, dialect))

    def open(self, request: web.Request) -> Account:
        """The request's account; made when it is first asked for."""
        try:
            return request[ACCOUNT]
        except KeyError:
            pattern = _pattern(request.match_info.route)
            found = request[ACCOUNT] = Account(pattern, self._dialects.get(pattern, ""), self._clock, self._clock.now())
            return found

    def begin(self, path: str, arrived: Instant) -> Account:
        """The account of a request that has no `web.Request`."""
        return Account(path, self._dialects.get(path, ""), self._clock, arrived)

    def close(self, request: web.Request, request_id: str, status: int | None, error: OffloaddError | None = None) -> None:
        """The request is over, with this status; None when its client left. Requests to the control plane have no account."""
        try:
            account = request[ACCOUNT]
        except KeyError:
            if _pattern(request.match_info.route) not in self._dialects:
                return
            account = self.open(request)
        if error is not None:
            account.reason = error.message
        self._close(account, request_id, status, self._who(), self._clock.now())

    def settle(self, account: Account, request_id: str, status: int | None, key: str) -> None:
        """The same of an account, a moment later: the next request, which may come at once, need not wait for it.

        `key` is the name of the API key that the request came with, which has no limits of its own.
        """
        now = self._clock.now()
        self._add(lambda: self._close(account, request_id, status, key, now))

    def answered(self, answered: Answered) -> None:
        """The same of a request that got its whole answer at once, which is all that there is to account for."""
        self._add(answered)
        if len(answered.body) > LARGE:
            self.flush()

    def _add(self, ended: _Ended) -> None:
        self._ended.append(ended)
        if len(self._ended) >= MOST_OPEN:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SOON, self._late)

    def _late(self) -> None:
        self._timer = None
        self.flush()

    def flush(self) -> None:
        """Close what is to be closed soon: for whoever wants to know of all that is over."""
        ended, chatty = self._ended, log.isEnabledFor(logging.DEBUG)
        while ended:
            one = ended.popleft()
            if not isinstance(one, Answered):
                one()
                continue
            served = one.served(self._dialects.get(one.path, ""))
            if chatty:
                _log(served)
            self._done(served)

    def _close(self, account: Account, request_id: str, status: int | None, key: str, now: Instant) -> None:
        account.closed = True
        served = _sum_up(account, request_id, status, key, now)
        account.early = account.lost = None  # both know the request, and the request this: a ring that would keep it
        _log(served)
        self._done(served)


class Answered(msgspec.Struct, gc=False):
    """One that an engine answered with 200, and whole at once."""

    request: str
    path: str
    key: str
    lease: Lease
    arrived: Instant
    ended: Instant
    """When the answer came, and went to its client."""
    bytes_in: int
    body: bytes
    """The answer's."""

    def served(self, dialect: str) -> Served:
        """What became of it."""
        lease, took = self.lease, Seconds(self.ended - self.arrived)
        tokens = tokens_in(self.body)
        return Served(
            request=self.request,
            path=self.path,
            dialect=dialect,
            fate=Fate.ANSWERED,
            status=200,
            arrived=self.arrived,
            duration=took,
            waited=lease.waited,
            first_byte=took,
            model=lease.host.instance.model,
            backend=lease.host.backend,
            instance=lease.host.instance,
            key=self.key,
            bytes_in=self.bytes_in,
            bytes_out=len(self.body),
            prompt_tokens=tokens.prompt,
            cached_tokens=tokens.cached,
            completion_tokens=tokens.completion,
            tokens_per_second=tokens.per_second,
            reason=lease.why,
        )


_Ended = Answered | Callable[[], None]


def _sum_up(account: Account, request_id: str, status: int | None, key: str, now: Instant) -> Served:
    tap, lease = account.tap, account.lease
    tokens = tap.tokens() if tap.size else Tokens()
    begun = tap.began
    completion = tokens.completion
    if completion is None and account.streamed and tap.events:
        completion = tap.events
    speed = tokens.per_second
    if speed is None and begun is not None and account.streamed and completion and now > begun:
        speed = completion / (now - begun)
    return Served(
        request=request_id,
        path=account.path,
        dialect=account.dialect,
        fate=_fate(account, status),
        status=CLIENT_LEFT if status is None else status,
        arrived=account.arrived,
        duration=Seconds(now - account.arrived),
        waited=None if lease is None else lease.waited,
        first_byte=None if begun is None or account.granted is None else Seconds(max(0.0, begun - account.granted)),
        model=account.model,
        backend=None if lease is None else lease.host.backend,
        instance=None if lease is None else lease.host.instance,
        key=key,
        streamed=account.streamed,
        chunks=tap.events if account.streamed else 0,
        bytes_in=account.size_in,
        bytes_out=tap.size,
        prompt_tokens=tokens.prompt,
        cached_tokens=tokens.cached,
        completion_tokens=completion,
        tokens_per_second=speed,
        hedged=account.hedged,
        reason=account.reason or (lease.why if lease else ""),
    )


def _fate(account: Account, status: int | None) -> Fate:
    if status is None:
        return Fate.CANCELLED
    if account.turned_away and not account.sent:
        return Fate.REFUSED
    if account.broken or (status >= 500 and account.sent):
        return Fate.FAILED
    return Fate.ANSWERED if account.sent or status < 400 else Fate.REFUSED


@functools.lru_cache(maxsize=256)  # more than there are routes
def _pattern(route: web.AbstractRoute) -> str:
    resource = route.resource
    return "" if resource is None else resource.canonical


def _log(served: Served) -> None:
    """The access log: one line per request. What went well is told only to those who ask for it."""
    level = logging.WARNING if served.fate is Fate.FAILED else logging.DEBUG
    if not log.isEnabledFor(level):
        return
    said = about(
        EventKind.REQUEST_ENDED,
        model=served.model or "",
        instance=served.instance or "",
        backend=served.backend or "",
        request=served.request,
        path=served.path,
        fate=served.fate.value,
        status=served.status,
        duration_s=round(served.duration, 4),
        first_byte_s=None if served.first_byte is None else round(served.first_byte, 4),
        prompt_tokens=served.prompt_tokens,
        completion_tokens=served.completion_tokens,
    )
    where = f" by {served.instance}" if served.instance else ""
    log.log(
        level,
        "%s %s %d in %.3f s%s: %s",
        served.path,
        served.fate.value,
        served.status,
        served.duration,
        where,
        served.reason[:300],
        extra=said,
    )
