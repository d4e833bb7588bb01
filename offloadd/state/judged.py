"""A request's head that has been let in: what its next, equal one need not be asked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offloadd.state.access import Caller


@dataclass(slots=True, eq=False, kw_only=True)
class Judged:
    """A POST for inference, from a client on TCP, to which no rule about sites or queries applies."""

    path: str
    """The route's pattern, which is the path as well."""
    caller: Caller
    fields: Sequence[tuple[bytes, bytes]]
    """Its header fields, save for the length of its body."""
    keep_alive: bool
    onward: bytes | None = field(default=None, init=False)
    """Those of them that go on to engines, as lines; written when they are first needed, and empty where that is not enough."""
