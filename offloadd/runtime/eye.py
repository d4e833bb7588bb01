"""What the config's files are: their content as one digest, and the folders whose events tell that it may be another."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.config import ConfigUnreadableError, SourceText, read_sources

_BLURRED_NS = 2_000_000_000
"""A file that changed so shortly before it was read may change again and keep its date: it is read again."""
_Marks = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One look."""

    digest: bytes
    """Tells the content from any other; why it cannot be read is content, too."""
    folders: frozenset[Path]
    """To be watched."""


class Eye:
    """Looks at one config path again and again. Where no date has changed, nothing is read. Everything blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: Sequence[str] | None = None
        """What the content was last read from; None where it could not be read."""
        self._still: tuple[bytes, _Marks] | None = None
        """A content, and the marks that the files had when it was last found to be theirs."""

    def look(self, known: bytes = b"") -> Sight | None:
        """Content and folders, or None where the content is what is `known`."""
        if known and self._still is not None and self._still[0] == known and self._still[1] == self._marks():
            return None
        files, now = self._files, time.time_ns()
        marks = self._marks()  # ahead of the reading: a change in between gets another mark
        digest = self._read()
        if digest != known:
            return Sight(digest=digest, folders=watched_folders(self._path))
        is_sure = self._files == files is not None and marks and all(changed < now - _BLURRED_NS for _, changed, *_ in marks)
        self._still = (known, marks) if is_sure else None
        return None

    def _read(self) -> bytes:
        try:
            sources = read_sources(self._path)
        except ConfigUnreadableError as error:
            self._files = None
            return str(error).encode()
        self._files = [source.name for source in sources]
        return digest_of(sources)

    def _marks(self) -> _Marks:
        """Of the path, which may be a folder, and of its files; none when one is gone. A change of any gives it another mark."""
        try:
            found = [os.stat(path) for path in (str(self._path), *(self._files or ()))]  # noqa: PTH116
        except OSError:
            return []
        return [(each.st_mtime_ns, each.st_ctime_ns, each.st_size, each.st_ino, each.st_dev, each.st_mode) for each in found]


def digest_of(sources: Iterable[SourceText]) -> bytes:
    """What tells these texts from any others."""
    whole = hashlib.sha256()
    for source in sources:
        for text in (source.name, source.text):
            raw = text.encode()
            whole.update(len(raw).to_bytes(8, "big") + raw)
    return whole.digest()


def watched_folders(path: Path) -> frozenset[Path]:
    """The folder of every step on the way to the file through symbolic links: a swap of any of them is then an event.

    Watching the file itself would go deaf at the first editor that renames a new file over it.
    """
    folders: set[Path] = set()
    step = path.absolute()
    for _ in range(40):
        folders.add(step if step.is_dir() else step.parent)
        link = next((part for part in (step, *step.parents) if part.is_symlink()), None)
        if link is None:
            break
        folders.add(link.parent)
        step = (link.parent / link.readlink() / step.relative_to(link)).absolute()
    return frozenset(folder for folder in folders if folder.is_dir())
