"""Inputs made from good ones by chance: bytes changed in place, and JSON whose parts are of other kinds than they should be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 255, 256, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308)
LARGE = 100_000
"""Characters of a list that is not repeated thirty times over."""
_DEEP: list[Any] = []
for _ in range(40):
    _DEEP = [_DEEP]
WORDS = ("", "a", "x" * 70_000, "\0", "\x1b[2J", "\r\n", "é", "\u2028", "..", "/", "https://a/", "[DONE]", "NaN", "1" * 400)
_ODD: tuple[Any, ...] = (None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [None], [{}], {"": None}, _DEEP)
_BYTES = (
    b"\0",
    b"\r\n",
    b"\n\n",
    b"\xff\xfe",
    b"\xc3",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b":",
    b",",
    b"%",
    b"-",
    b"9" * 40,
    b" " * 99,
)


def mutated(rng: Random, corpus: Sequence[bytes], tokens: Sequence[bytes] = (), most: int = 6) -> bytes:
    """One of the corpus with a few places changed; now and then something repeated very often."""
    data = bytearray(rng.choice(corpus))
    known = (*_BYTES, *tokens, *tokens)
    for _ in range(rng.randint(0, most)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(20)]
            case 2:
                data[at:at] = rng.choice(known)
            case 3:
                data[at : at + rng.randrange(8)] = rng.choice(known)
            case 4:
                data[at:at] = data[at : at + rng.randrange(200)]
            case 5:
                other = rng.choice(corpus)
                begin = rng.randrange(len(other) + 1)
                data[at:] = other[begin:]
            case 6 if rng.random() < 0.05:
                data[at:at] = rng.choice(known) * rng.choice((50, 2000, 20_000))
            case _:
                data[at:at] = rng.randbytes(rng.randrange(6))
    return bytes(data)


def mutated_text(rng: Random, corpus: Sequence[str], tokens: Sequence[str] = (), most: int = 6) -> str:
    """The same for text."""
    return mutated(rng, [each.encode() for each in corpus], [each.encode() for each in tokens], most).decode(errors="replace")


def bent(rng: Random, value: Any, most: int = 3) -> Any:
    """A copy of a JSON value with a few of its parts replaced, dropped or added."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, most)):
        _bend(rng, holder)
    return holder[0]


def _bend(rng: Random, holder: list[Any]) -> None:
    places: list[tuple[Any, Any]] = []
    _collect(holder, places, 0)
    where, key = rng.choice(places)
    match rng.randrange(6):
        case 0 if isinstance(where, dict):
            where.pop(key, None)
        case 1 if isinstance(where, dict):
            where[rng.choice(("", "type", "url", "index", "x" * 300, rng.choice(list(where) or ["a"])))] = copy.deepcopy(
                rng.choice(_ODD)
            )
        case 2 if isinstance(where, list):
            more = where[:200]
            # What takes long is to be the parser, and not the making of a hundred megabytes for it.
            where.extend(copy.deepcopy(more) * (rng.choice((1, 1, 30)) if len(repr(more)) < LARGE else 1))
        case 3:
            other, name = rng.choice(places)
            where[key] = copy.deepcopy(other[name])
        case _:
            where[key] = copy.deepcopy(rng.choice(_ODD))


def _collect(value: Any, places: list[tuple[Any, Any]], depth: int) -> None:
    if depth > 12 or len(places) > 2000:
        return
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        places.append((value, key))
        _collect(value[key], places, depth + 1)


def cut(rng: Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces."""
    places = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 6)))
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]
