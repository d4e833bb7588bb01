"""Heads of answers that have been parsed before: one that is the same again, save for its length, says the same again."""

from __future__ import annotations

from dataclasses import dataclass

from offloadd.heads import parted
from offloadd.proxy import headers
from offloadd.proxy.headers import Fields

REMEMBERED = 256
"""Heads; the one that was learned first is forgotten first. Engines that say the date have a new one each second."""
LONGEST = 2048
"""Bytes of a head that is remembered."""


@dataclass(slots=True, eq=False, kw_only=True)
class Head:
    """The head of an answer. `length` is None when its end is told otherwise."""

    status: int
    fields: Fields
    length: int | None
    _onward: bytes | None = None

    @property
    def onward(self) -> bytes:
        """The fields that a client gets, as lines; BrokenAnswerError when one of them cannot be passed on."""
        if self._onward is None:
            self._onward = headers.to_client(self.fields)
        return self._onward


class AnswerHeads:
    """Of whole answers on connections that may be kept."""

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}

    def split(self, data: bytes) -> tuple[Head, bytes] | None:
        """Head and body, where the bytes are exactly one answer with a head that is known; its `length` is another's."""
        parts = parted(data, LONGEST)
        head = None if parts is None else self._known.get(parts[0])
        return None if parts is None or head is None else (head, parts[1])

    def learn(self, data: bytes, head: Head) -> None:
        """These bytes were a whole answer, and this its head. Only one that went well, and reached its client, is learned."""
        parts = parted(data, LONGEST)
        if parts is None or head.status != 200 or head._onward is None:
            return
        if len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[parts[0]] = head
