"""The one error of the readers: a file that cannot be read as what it claims to be, and where that shows."""

from __future__ import annotations

from pathlib import Path

from offloadd.errors import PermanentError


class HeaderError(PermanentError):
    """A model file is refused. `offset` is the byte at which the refused value lies."""

    def __init__(self, path: Path, offset: int, problem: str, *, hint: str = "", is_short: bool = False) -> None:
        super().__init__(f"{path}: {problem} (at byte {offset})", hint=hint)
        self.path = path
        self.offset = offset
        self.problem = problem
        self.is_short = is_short
        """Whether the file ends before what it announces: it is not whole, or not yet."""
