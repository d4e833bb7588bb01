"""Located, explained config problems, and how they are printed."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from offloadd.config.source import Mark, SourceText

_WIDTH = 100
"""Columns of a source line that are shown."""
_LONGEST = 100_000
"""Characters of a source line up to which it is searched for secrets, and so may be shown."""
_BEFORE = 60
"""Columns of it that are shown before the caret."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Names end in these where people keep secrets. Read on raw lines, because a file that does not parse has no tree to ask.
_SECRET_LINE = re.compile(r"(?i)(?:key|token|secret|passw(?:or)?d)[\"']?\s*[:=,]\s*+[\"']?+(?!\s*$|\$\{|[\[{&*]|--|[\"']\s*$)\S")


class Severity(StrEnum):
    """An error stops the config from being applied; a warning and a note do not."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem: where it is, what it is, and in `hint` what to do about it."""

    severity: Severity
    mark: Mark
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return escape(f"{self.mark}: {self.severity}: {self.message}")


def error(mark: Mark, message: str, hint: str = "") -> Diagnostic:
    """A problem that stops the config from being applied."""
    return Diagnostic(Severity.ERROR, mark, message, hint)


def warning(mark: Mark, message: str, hint: str = "") -> Diagnostic:
    """Something that is probably not meant."""
    return Diagnostic(Severity.WARNING, mark, message, hint)


def note(mark: Mark, message: str, hint: str = "") -> Diagnostic:
    """Something worth knowing."""
    return Diagnostic(Severity.NOTE, mark, message, hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean "…"?)`, or nothing when no known name is close."""
    folded = {entry.lower().replace("-", "_"): entry for entry in known}
    near = difflib.get_close_matches(name[:128].lower().replace("-", "_"), folded, n=1, cutoff=0.65)
    return f' (did you mean "{folded[near[0]]}"?)' if near else ""


def escape(text: str) -> str:
    """Make control, invisible and direction-changing characters visible, so that no config text can steer a terminal."""
    return _UNPRINTABLE.sub(lambda found: _escaped(found[0]), text)


def render_text(
    diagnostics: Iterable[Diagnostic], sources: Sequence[SourceText] = (), hidden: Collection[tuple[str, int]] = ()
) -> str:
    """Print each as `file:line:column: error: message`, with its source line, a caret and the hint below.

    `hidden` holds (file, line) of lines that are never shown, beside those that look as if they held a secret.
    """
    lines = {source.name: source.text.split("\n") for source in sources}
    return "".join(f"{line}\n" for entry in diagnostics for line in _block(entry, lines, hidden))


def render_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, str | int]]:
    """The same as data: severity, file, line, column, message, hint."""
    return [
        {
            "severity": str(entry.severity),
            "file": entry.mark.file,
            "line": entry.mark.line,
            "column": entry.mark.column,
            "message": escape(entry.message),
            "hint": escape(entry.hint),
        }
        for entry in diagnostics
    ]


def _block(entry: Diagnostic, lines: dict[str, list[str]], hidden: Collection[tuple[str, int]]) -> Iterator[str]:
    yield str(entry)
    text = _source_line(entry.mark, lines, hidden)
    if text is not None:
        yield from _pointed(text, entry.mark.column - 1)
    if entry.hint:
        yield f"  hint: {escape(entry.hint)}"


def _source_line(mark: Mark, lines: dict[str, list[str]], hidden: Collection[tuple[str, int]]) -> str | None:
    file = lines.get(mark.file, [])
    if mark.line > len(file) or (mark.file, mark.line) in hidden:
        return None
    text = file[mark.line - 1].rstrip("\r")
    is_shown = text.strip() and len(text) <= _LONGEST and not _SECRET_LINE.search(text)
    return text if is_shown else None


def _pointed(text: str, column: int) -> Iterator[str]:
    """The line, cut around `column` (from 0), and a caret below it."""
    start = 0 if len(text) <= _WIDTH else max(0, column - _BEFORE)
    left = ("…" if start else "") + _visible(text[start:column])
    right = _visible(text[column : start + _WIDTH]) + ("…" if len(text) > start + _WIDTH else "")
    yield f"    {left}{right}"
    yield f"    {' ' * _columns(left)}^"


def _visible(text: str) -> str:
    return escape(text.replace("\t", " "))


def _columns(text: str) -> int:
    """Terminal columns that `text` takes: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
