"""Where an answer's body ends, and whether bytes are whole chunks of it."""

from __future__ import annotations

import re

from offloadd.proxy.headers import BrokenAnswerError, Fields

_CHUNK = re.compile(rb"([0-9a-fA-F]{1,7})\r\n")
"""How a chunk begins in its plainest form."""
COMMON = 4096
"""Bytes of a chunk that are looked up: a token's has some hundreds."""


def _chunk_starts() -> list[tuple[bytes, ...]]:
    """By the bytes of one whole chunk, framing included: the ways to begin it. None for numbers of bytes that no chunk has."""
    starts: list[tuple[bytes, ...]] = [()] * COMMON
    for size in range(1, COMMON):
        line = b"%x\r\n" % size
        if (whole := len(line) + size + 2) < COMMON:
            starts[whole] = (line, line.upper())
    return starts


CHUNK_STARTS = _chunk_starts()
"""One look and one comparison tell that bytes are one whole chunk, not the last."""


def are_whole_chunks(data: bytes) -> bool:
    """Whether the bytes are whole chunks in their plainest form, and none of them the last one."""
    place, end = 0, len(data)
    while place < end:
        found = _CHUNK.match(data, place)
        if found is None:
            return False
        size = int(found[1], 16)
        place = found.end() + size + 2
        if size == 0 or place > end or data[place - 2 : place] != b"\r\n":
            return False
    return True


def framing(fields: Fields) -> tuple[bool, int | None]:
    """Whether the body is chunked, and its length where one is given. What could be read in two ways is refused."""
    coded: list[bytes] = []
    sizes: set[bytes] = set()
    for name, value in fields:
        if len(name) == 14 and name.lower() == b"content-length":
            sizes.add(value.strip())
        elif len(name) == 17 and name.lower() == b"transfer-encoding":
            coded.append(value.strip().lower())
    if coded and (coded != [b"chunked"] or sizes):
        raise BrokenAnswerError("its transfer encoding is not plainly chunked")
    size = sizes.pop() if sizes else None
    if sizes or (size is not None and not size.isdigit()):
        raise BrokenAnswerError("its length is not one number")
    return bool(coded), None if size is None else int(size)
