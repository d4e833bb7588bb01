"""Bounds on what a config text may hold, and what every spelling does at them.

They are far above any real config and keep hostile or broken text from costing time or memory.
"""

from __future__ import annotations

import math
import re

from offloadd.config.diagnostics import Diagnostic, error
from offloadd.config.source import Mark

MAX_DEPTH = 32
MAX_NODES = 200_000
MAX_DIGITS = 30
"""Digits of a whole number; the widest field needs 19."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextError(Exception):
    """Text that cannot be read any further."""

    def __init__(self, mark: Mark, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.diagnostic: Diagnostic = error(mark, message, hint)


def check_depth(depth: int, mark: Mark) -> None:
    """Raise TextError when `depth` levels are too many."""
    if depth > MAX_DEPTH:
        raise TextError(mark, f"nested deeper than {MAX_DEPTH} levels")


def check_count(count: int, mark: Mark) -> None:
    """Raise TextError when `count` values are too many."""
    if count > MAX_NODES:
        raise TextError(mark, f"more than {MAX_NODES:,} values in one file, counting each use of an alias")


def whole_number(text: str, mark: Mark, base: int = 10) -> int:
    """Read digits that are known to be well formed."""
    if len(text) > MAX_DIGITS:
        raise TextError(mark, f"a number of {len(text)} characters is more than any setting can mean")
    return int(text, base)


def real_number(text: str, mark: Mark) -> float:
    """Read a number that is known to be well formed; infinities and not-a-number have no use in a config."""
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise TextError(mark, "not a finite number")
    return value


def whole_text(text: str, mark: Mark) -> str:
    """`text` itself; half of a surrogate pair, which an escape can spell, is not text."""
    if not text.isascii() and _SURROGATE.search(text):
        raise TextError(mark, "an escape spells half of a character", "a character above U+FFFF takes two \\u escapes in a row")
    return text
