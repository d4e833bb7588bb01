"""Secrets that we know, kept out of all that is written: values of `${env:…}` and `${file:…}`, and keys spelled out in a config."""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "***"
SHORTEST = 8
"""What is shorter would be found in innocent words."""
_MOST = 1000

_known: dict[str, None] = {}
_pattern: re.Pattern[str] | None = None


def hide(values: Iterable[str]) -> None:
    """From now on these are not written. The latest so many are kept: a reload brings new ones, and old ones are still about."""
    global _pattern
    for value in values:
        for line in value.splitlines():
            if len(line.strip()) >= SHORTEST:
                _known.pop(line.strip(), None)
                _known[line.strip()] = None
    for value in list(_known)[: max(0, len(_known) - _MOST)]:
        del _known[value]
    longest_first = sorted(_known, key=len, reverse=True)
    _pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def clean(text: str) -> str:
    """The text without them."""
    return _pattern.sub(HIDDEN, text) if _pattern is not None else text
