"""Bytes, seconds and instants: how they are typed, read and printed.

`Instant` is a reading of a monotonic clock (see `clock.py`), never wall time; `Seconds` is a span.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)
Instant = NewType("Instant", float)

_SIZE_UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*")
_FIGURE = re.compile(r"\d+(\.\d+)?( (ms|s|min|h|d|B|KiB|MiB|GiB|TiB)\b)?( \d+ (s|min|h)\b)?")
_MAX_BYTES = 2**60
_MAX_SECONDS = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole, such as `95%` of a device's memory; `percent` is 0..100."""

    percent: float

    def of(self, total: Bytes) -> Bytes:
        """The share of `total`, rounded down."""
        return Bytes(int(total * self.percent / 100))

    def __str__(self) -> str:
        return f"{self.percent:g}%"


def parse_bytes(text: str) -> Bytes:
    """Read `512MiB`, `6 GiB`, `1.5GB`; raise ValueError that says what was expected."""
    number, unit = _split(text, "a size such as 512MiB or 6GiB")
    if unit not in _SIZE_UNITS:
        raise ValueError(_unit_problem("size", unit, _SIZE_UNITS))
    value = int(number * _SIZE_UNITS[unit])
    if value > _MAX_BYTES:
        raise ValueError(f"{text.strip()} is more than any machine has")
    return Bytes(value)


def parse_size(text: str) -> Bytes | Share:
    """Read a size as `parse_bytes` does, or a share such as `20%`."""
    if text.strip().endswith("%"):
        number, unit = _split(text, "a share such as 20%")
        if unit != "%":
            raise ValueError("expected a share such as 20%")
        if number > 100:
            raise ValueError(f"a share is at most 100%, not {number:g}%")
        return Share(number)
    return parse_bytes(text)


def parse_seconds(text: str) -> Seconds:
    """Read `90s`, `10m`, `1h`, `500ms`; raise ValueError that says what was expected."""
    number, unit = _split(text, "a time such as 90s, 10m or 1h")
    if unit not in _TIME_UNITS:
        raise ValueError(_unit_problem("time", unit, _TIME_UNITS))
    value = number * _TIME_UNITS[unit]
    if value > _MAX_SECONDS:
        raise ValueError(f"{text.strip()} is longer than ten years")
    return Seconds(value)


def format_bytes(value: int) -> str:
    """Print bytes as people say them: `9.1 GiB`, `512 MiB`, `17 B`; keeps the sign."""
    size = abs(value)
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= step:
            digits = 1 if size < 100 * step and unit != "KiB" else 0
            return f"{value / step:.{digits}f} {unit}"
    return f"{value} B"


def format_seconds(value: float) -> str:
    """Print a span as people say it: `250 ms`, `41 s`, `3 min 5 s`, `2 h 10 min`."""
    if value < 0:
        return f"-{format_seconds(-value)}"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 10:
        return f"{value:.1f} s".replace(".0 s", " s")
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole // 60, "min", whole % 60, "s")
    if whole < 86400:
        return _two(whole // 3600, "h", whole % 3600 // 60, "min")
    return _two(whole // 86400, "d", whole % 86400 // 3600, "h")


def gist(text: str) -> str:
    """The text with its numbers, sizes and spans as `#`: two texts that differ in them alone say the same."""
    return _FIGURE.sub("#", text)


def counted(number: int, one: str, many: str) -> str:
    """`1 request runs`, `2 requests run`: the number with the words that fit it."""
    return f"{number} {one if number == 1 else many}"


def _two(major: int, major_unit: str, minor: int, minor_unit: str) -> str:
    tail = f" {minor} {minor_unit}" if minor else ""
    return f"{major} {major_unit}{tail}"


def _split(text: str, expected: str) -> tuple[float, str]:
    # The length first: blanks without end could be read in as many ways.
    match = _QUANTITY.fullmatch(text) if len(text) <= 40 else None
    if match is None:
        raise ValueError(f"expected {expected}")
    return float(match[1]), match[2]


def _unit_problem(kind: str, unit: str, units: dict[str, float] | dict[str, int]) -> str:
    known = ", ".join(units)
    if not unit:
        return f"a {kind} needs a unit (one of {known})"
    near = next((name for name in units if name.lower().rstrip("b") == unit.lower().rstrip("b")), None)
    hint = f"; did you mean {near}?" if near else ""
    return f'unknown {kind} unit "{unit}" (one of {known}){hint}'
