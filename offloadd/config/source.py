"""Config text with its name, and places in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MAX_TEXT = 4 * 2**20
"""Characters, and bytes on disk, of all the files of one config together."""


class Mark(NamedTuple):
    """One place in one file; line and column count from 1, the column in characters."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class SourceText:
    """The text of one config file, and the name to report it by."""

    name: str
    text: str

    @property
    def start(self) -> Mark:
        """The first character."""
        return Mark(self.name, 1, 1)
