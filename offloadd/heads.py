"""HTTP messages that are here as a whole: what is the same in many of them is their head, save for the length of the body."""

from __future__ import annotations

import re

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,7})(?=\r\n(?![ \t]))")
"""One line of its own, which no other continues."""
_USUAL = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
"""How nearly all write it: these are found in a fraction of the time."""
_LONGEST = 7
"""Digits of a length."""


def parted(data: bytes, longest: int) -> tuple[bytes, bytes] | None:
    """A message's head without its length, and its body; None unless the bytes are one message of the length that it says.

    `longest` is how many bytes of head are looked through. That the rest of the head says nothing else about where the message ends
    is for others to judge, once: it is the same bytes each time.
    """
    end = data.find(b"\r\n\r\n", 0, longest)
    if end < 0:
        return None
    start = data.find(_USUAL[0], 0, end)
    if start < 0:
        start = data.find(_USUAL[1], 0, end)
    digits = start + len(_USUAL[0])
    after = data.find(b"\r\n", digits, end + 2)
    size = data[digits:after]
    if start < 0 or not size.isdigit() or len(size) > _LONGEST or data[after + 2] in b" \t":
        length = _LENGTH.search(data, 0, end + 2)
        if length is None:
            return None
        start, after, size = length.start(), length.end(), length[1]
    if len(data) - end - 4 != int(size):
        return None
    return data[:start] + data[after:end], data[end + 4 :]
