"""One file, read forwards through a window of fixed size: what a file claims of itself never decides how much is held."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offloadd.registry.readers.errors import HeaderError

SCAN_LIMIT = 64 * 2**20
"""Bytes read from one file at most; what is skipped by seeking does not count."""
TAKE_LIMIT = 2**20
"""Bytes handed out in one piece at most."""
_WINDOW = 2**18
_FIRST_WINDOW = 2**14


class Source:
    """Reads forwards. Every refusal names the file and the byte."""

    def __init__(self, handle: int, path: Path, limit: int = SCAN_LIMIT) -> None:
        self.path = path
        self._limit = limit
        self.size = os.fstat(handle).st_size
        self._handle = handle
        self._window = b""
        self._start = 0
        self._at = 0
        self._scanned = 0

    @property
    def position(self) -> int:
        """The file offset of the next byte."""
        return self._start + self._at

    @property
    def left(self) -> int:
        """Bytes between here and the end of the file."""
        return self.size - self.position

    def refuse(self, problem: str, *, at: int | None = None, hint: str = "", is_short: bool = False) -> HeaderError:
        """The error to raise for what lies at `at`, by default here."""
        return HeaderError(self.path, self.position if at is None else at, problem, hint=hint, is_short=is_short)

    def take(self, count: int, limit: int = TAKE_LIMIT) -> bytes:
        """The next `count` bytes; at most `limit`."""
        if count > limit:
            raise self.refuse(f"{count} bytes in one piece are more than the {limit} that are read")
        if self._at + count > len(self._window):
            self._refill(count)
        self._at += count
        return self._window[self._at - count : self._at]

    def skip(self, count: int) -> None:
        """Leave out `count` bytes, without reading those beyond the window."""
        if not 0 <= count <= self.left:
            raise self.refuse(f"{count} bytes are announced, {self.left} are left in the file", is_short=count > 0)
        self._move(self._at + count)

    def skip_strings(self, count: int, length: struct.Struct) -> None:
        """Leave out `count` strings, each a u64 `length` and its bytes."""
        done = 0
        while done < count:
            if len(self._window) - self._at < length.size:
                self._refill(length.size)
            done += self._hop(count - done, length)

    def _hop(self, count: int, length: struct.Struct) -> int:
        """Skip the strings whose length lies in the window, at most `count`; returns how many."""
        # Vocabularies have some hundred thousand strings: the loop does nothing else, and the end of the window is an exception.
        window, before, at, unpack = self._window, self._at, self._at, length.unpack_from
        try:
            for hopped in range(count):  # noqa: B007
                before, at = at, at + unpack(window, at)[0] + 8
            hopped = count
        except (struct.error, OverflowError, IndexError):
            pass
        if self._start + at > self.size:
            raise self.refuse("a string reaches past the end of the file", at=self._start + before, is_short=True)
        self._move(at)
        return hopped

    def _move(self, at: int) -> None:
        """Go to index `at` of the window, or beyond it."""
        if at <= len(self._window):
            self._at = at
        else:
            self._start, self._at, self._window = self._start + at, 0, b""

    def _refill(self, count: int) -> None:
        position = self.position
        if count > self.size - position:
            raise self.refuse(
                f"the file ends here: {count} bytes are expected, {max(0, self.size - position)} are left", is_short=True
            )
        wanted = min(max(count, _WINDOW if self._scanned else _FIRST_WINDOW), self.size - position)
        self._scanned += wanted
        if self._scanned > self._limit:
            raise self.refuse(f"the header is longer than the {self._limit} bytes that are read of it")
        window = os.pread(self._handle, wanted, position)
        if len(window) < count:
            raise self.refuse("the file became shorter while it was read", is_short=True)
        self._start, self._at, self._window = position, 0, window


@contextmanager
def open_source(path: Path, limit: int = SCAN_LIMIT) -> Iterator[Source]:
    """The regular file at `path`, of which `limit` bytes may be read; a pipe or a device would block or never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise HeaderError(path, 0, f"cannot be opened: {_reason(error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise HeaderError(path, 0, "is not a regular file")
        yield Source(handle, path, limit)
    except OSError as error:
        raise HeaderError(path, 0, f"cannot be read: {_reason(error)}") from error
    finally:
        os.close(handle)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
