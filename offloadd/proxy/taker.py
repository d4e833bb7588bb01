"""What a connection to an instance tells of one answer, and to whom."""

from __future__ import annotations

from typing import Protocol

from offloadd.proxy.answer_heads import Head
from offloadd.proxy.headers import Fields


class StaleError(ConnectionError):
    """A connection that had been kept was closed before a byte of the answer came: the request may be sent again on a new one."""


class Taker(Protocol):
    """Who takes one answer. `finish` or `lost` comes last, and once; or `whole` alone, for whoever `takes_whole`."""

    takes_whole: bool

    def whole(self, head: Head, body: bytes) -> None:
        """All of an answer that is no refusal and came in one piece."""
        ...

    def begin(self, head: Head) -> None:
        """Its head is here."""
        ...

    def feed(self, piece: bytes) -> None:
        """A piece of its body."""
        ...

    def finish(self, trailer: Fields) -> None:
        """It is whole."""
        ...

    def lost(self, error: Exception) -> None:
        """It will not be."""
        ...

    def sign(self) -> None:
        """Bytes came lately."""
        ...

    def hold(self) -> None:
        """The backend takes no more for now."""
        ...

    def go_on(self) -> None:
        """It takes more again."""
        ...
