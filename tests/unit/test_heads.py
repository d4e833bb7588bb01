"""Whole messages, taken apart."""

from __future__ import annotations

import pytest

from offloadd.heads import parted

LONGEST = 200


@pytest.mark.parametrize("name", [b"Content-Length: ", b"content-length:", b"Content-length: "])
@pytest.mark.parametrize("body", [b"", b"x", b"\r\n\r\n", b"content-length: 3\r\n\r\n"])
def test_the_length_is_taken_out_and_nothing_else(name: bytes, body: bytes) -> None:
    for before, after in ((b"A: 1\r\n", b"B: 2\r\n"), (b"", b"B: 2\r\n"), (b"A: 1\r\n", b"")):
        data = b"HTTP/1.1 200 OK\r\n" + before + name + b"%d\r\n" % len(body) + after + b"\r\n" + body
        assert parted(data, LONGEST) == (b"\r\n".join([b"HTTP/1.1 200 OK", *(before + after).splitlines()]), body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"A\r\n\r\n",
        b"A\r\nContent-Length: 1\r\n\r\n",  # too little
        b"A\r\nContent-Length: 1\r\n\r\nxx",  # too much
        b"A\r\nContent-Length: 1\r\n 1\r\n\r\nx",  # a line that is continued
        b"A\r\nContent-Length: 1,1\r\n\r\nx",
        b"A\r\nContent-Length: +1\r\n\r\nx",
        b"A\r\nContent-Length: 0x1\r\n\r\nx",
        b"A\r\nContent-Length: 12345678\r\n\r\nx",
        b"A\r\nX-Content-Length: 1\r\n\r\nx",
        b"A Content-Length: 1\r\n\r\nx",
        b"A\r\nContent-Length : 1\r\n\r\nx",
        b"A\r\nTransfer-Encoding: chunked\r\n\r\nContent-Length: 0\r\n\r\n",
        b"A" * LONGEST + b"\r\nContent-Length: 1\r\n\r\nx",
    ],
)
def test_what_is_not_plainly_one_message_is_left_alone(data: bytes) -> None:
    assert parted(data, LONGEST) is None


def test_a_second_length_stays_where_it_is() -> None:
    assert parted(b"A\r\nContent-Length: 1\r\nContent-Length: 5\r\n\r\nx", LONGEST) == (b"A\r\nContent-Length: 5", b"x")
