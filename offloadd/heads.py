"""HTTP messages that are here as a whole: what is the same in many of them is their head, save for the length of the body."""

from __future__ import annotations

import re

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,7})(?=\r\n(?![ \t]))")
"""One line of its own, which no other continues."""


def parted(data: bytes, longest: int) -> tuple[bytes, bytes] | None:
    """A message's head without its length, and its body; None unless the bytes are one message of the length that it says.

    `longest` is how many bytes of head are looked through. That the rest of the head says nothing else about where the message ends
    is for others to judge, once: it is the same bytes each time.
    """
    end = data.find(b"\r\n\r\n", 0, longest)
    length = _LENGTH.search(data, 0, end + 2)
    if length is None or len(data) - end - 4 != int(length[1]):
        return None
    return data[: length.start()] + data[length.end() : end], data[end + 4 :]
