"""Requests that begin as an earlier one did are let in without another look at their heads, and served without a task.

What a head was judged by (the config's rules, its bytes, that it came over TCP) is the same again, so the judgement is. Only the
length of the body may differ. Of a head only a keyed digest is remembered, since there are keys in it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from aiohttp import web

from offloadd.heads import parted
from offloadd.state.access import Access, Caller, KeyLimits
from offloadd.state.judged import Judged
from offloadd.turn import Turn

REMEMBERED = 1024
"""Heads; the one that was learned first is forgotten first."""
LONGEST = 8190
"""Bytes of a head that may be remembered."""
ADMITTED: web.RequestKey[Caller] = web.RequestKey("admitted", Caller)
"""Who makes a request that has passed every check of its head."""
_OF_ONE = frozenset({b"x-request-id", b"origin", b"sec-fetch-site", b"sec-fetch-mode"})
"""What makes a request one of a kind, or a browser's."""
_FREE = KeyLimits()


class Errand(Protocol):
    """A request under way without a task of its own."""

    def gone(self) -> None:
        """Its client has left."""
        ...


Take = Callable[[Judged, bytes, Any], Errand | None]
"""Begins what can begin at once, given its body and the connection that it came on. None leaves it to the ordinary way."""


class Lane:
    """What is remembered of heads, as long as the rules are the same."""

    def __init__(self, access: Callable[[], Access], hosts: Callable[[], Collection[str]], take: Take, turn: Turn) -> None:
        """`access` and `hosts` give other objects when the rules have changed."""
        self._access = access
        self._hosts = hosts
        self._take = take
        self.turn = turn
        self._rules: tuple[Access, Collection[str]] | None = None
        self._made_sure = 0
        """The turn in which these were seen to be the present ones."""
        self._secret = os.urandom(32)
        self._known: dict[bytes, Judged] = {}

    def start(self, data: bytes, client: object) -> Errand | None:
        """Begin a request that is here as a whole, if its head is known and it can begin at once."""
        parts = parted(data, LONGEST)
        if parts is None:
            return None
        judged = self._known.get(self._digest(parts[0]))
        if judged is None:
            return None
        number = self.turn.number
        if not number or number != self._made_sure:
            if not self.holds(self._rules):
                return None
            self._made_sure = number
        return self._take(judged, parts[1], client)

    @property
    def rules(self) -> tuple[Access, Collection[str]]:
        """By what heads are judged now."""
        return self._access(), self._hosts()

    def holds(self, rules: tuple[Access, Collection[str]] | None) -> bool:
        """Whether these are the rules still."""
        return rules is not None and rules[0] is self._access() and rules[1] is self._hosts()

    def mark(self, data: bytes) -> bytes:
        """What a whole request will be known by; empty where it cannot be."""
        parts = parted(data, LONGEST)
        return b"" if parts is None else self._digest(parts[0])

    def learn(self, mark: bytes, path: str, fields: Sequence[tuple[bytes, bytes]], caller: Caller, *, keep_alive: bool) -> None:
        """The request has passed under the present rules. A key's limits are counted on the ordinary way only."""
        if not mark or caller.limits != _FREE or not _OF_ONE.isdisjoint(name.lower() for name, _ in fields):
            return
        rules = self.rules
        if rules[0].cors_origins:
            return
        if not self.holds(self._rules):
            self._known.clear()
            self._rules = rules
            self._made_sure = 0
        if mark in self._known:
            return
        if len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        kept = tuple(pair for pair in fields if pair[0].lower() != b"content-length")
        self._known[mark] = Judged(path=path, caller=caller, fields=kept, keep_alive=keep_alive)

    def _digest(self, head: bytes) -> bytes:
        return hashlib.blake2b(head, digest_size=16, key=self._secret).digest()
