"""Reads single numbers out of an engine's metrics. The whole text would be tens of kilobytes of things that nobody asks for."""

from __future__ import annotations

import math
import re


def gauge(body: bytes, name: str) -> list[float]:
    """Every sample of this name, whatever its labels; those that are no number are left out."""
    found = re.findall(rb"^%s(?:\{.*\})?[ \t]+(\S+)" % re.escape(name).encode(), body, re.MULTILINE)
    numbers = (_number(text) for text in found)
    return [number for number in numbers if number is not None]


def _number(text: bytes) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
