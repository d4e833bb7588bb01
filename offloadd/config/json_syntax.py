r"""JSON text to a Node tree.

The standard parser decides what is JSON. It keeps no places, so a second walk over keys and values, now known to be in order,
builds the tree. The YAML parser could not do that: JSON allows tabs, a line break before a colon and `\ud83d\ude00`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from offloadd.config.diagnostics import Diagnostic
from offloadd.config.limits import TextError, check_count, check_depth, real_number, whole_number, whole_text
from offloadd.config.nodes import Node, Pair, Scalar, mapping
from offloadd.config.source import Mark, SourceText

_TEXT = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_VALUE = rf'({_TEXT}|[{{\[]|[^\s{{}}\[\],:"]+)'
"""A value that is whole, or the bracket that opens one."""
_PAIR = re.compile(rf"[\s,]*({_TEXT})\s*:\s*{_VALUE}")
_ITEM = re.compile(rf"[\s,]*{_VALUE}")
_CLOSING = re.compile(r"\s*[}\]]")
_STARTS_JSON = re.compile(r'\s*\{\s*(?:["}]|//|/\*)')
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}


def looks_like_json(text: str) -> bool:
    """Whether it opens as a JSON object does; a YAML flow mapping seldom quotes its first key."""
    return _STARTS_JSON.match(text) is not None


def parse_json(source: SourceText, problems: list[Diagnostic]) -> Node:
    """Read one JSON text; raise TextError at the first place that is not JSON."""
    try:
        # Numbers stay text here: reading a huge one takes long, and the walk below knows where it is.
        json.loads(source.text, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as problem:
        raise _explained(source, problem) from None
    except RecursionError:
        pass  # valid as far as it was read, and the walk says where it is too deep
    return _Walk(source, problems).document()


class _Walk:
    """Builds nodes from a text that is known to be JSON: so a pair that does not begin here is a bracket that closes here."""

    def __init__(self, source: SourceText, problems: list[Diagnostic]) -> None:
        self._file = source.name
        self._text = source.text
        self._problems = problems
        self._at = 0
        """Up to where it is read."""
        self._line = 1
        self._line_start = 0
        self._line_end = self._end_of_line()
        self._count = 0

    def document(self) -> Node:
        """The value that the text is."""
        found = _ITEM.match(self._text)
        assert found is not None  # noqa: S101  (it is JSON)
        self._at = found.end()
        return self._value(found[1], self._mark(found.start(1)), 1)

    def _value(self, word: str, mark: Mark, depth: int) -> Node:
        self._count += 1
        check_count(self._count, mark)
        if word == "{":
            check_depth(depth, mark)
            return Node(mapping(self._pairs(depth), self._problems), mark, mark.line)
        if word == "[":
            check_depth(depth, mark)
            return Node(list(self._items(depth)), mark, mark.line)
        return Node(_scalar(word, mark), mark, mark.line)

    def _pairs(self, depth: int) -> Iterator[Pair]:
        while found := _PAIR.match(self._text, self._at):
            self._at = found.end()
            name, word = found.groups()
            key = self._mark(found.start(1))
            yield Pair(_unquoted(name, key), key, self._value(word, self._mark(found.start(2)), depth + 1))
        self._close()

    def _items(self, depth: int) -> Iterator[Node]:
        while found := _ITEM.match(self._text, self._at):
            self._at = found.end()
            yield self._value(found[1], self._mark(found.start(1)), depth + 1)
        self._close()

    def _close(self) -> None:
        found = _CLOSING.match(self._text, self._at)
        assert found is not None  # noqa: S101  (it is JSON)
        self._at = found.end()

    def _mark(self, start: int) -> Mark:
        """The place of this character, which comes after those that were asked for before."""
        while start > self._line_end:
            self._line, self._line_start = self._line + 1, self._line_end + 1
            self._line_end = self._end_of_line()
        return Mark(self._file, self._line, start - self._line_start + 1)

    def _end_of_line(self) -> int:
        """Where the line break is, or the text's end."""
        found = self._text.find("\n", self._line_start)
        return len(self._text) if found < 0 else found


def _unquoted(word: str, mark: Mark) -> str:
    return whole_text(json.loads(word) if "\\" in word else word[1:-1], mark)


def _scalar(word: str, mark: Mark) -> Scalar:
    if word[0] == '"':
        return _unquoted(word, mark)
    if word in _WORDS:
        return _WORDS[word]
    if word.lstrip("-").isdigit():
        return whole_number(word, mark)
    return real_number(word, mark)


def _explained(source: SourceText, problem: json.JSONDecodeError) -> TextError:
    mark = Mark(source.name, problem.lineno, problem.colno)
    here = source.text[problem.pos : problem.pos + 1]
    before = source.text[: problem.pos].rstrip()
    if not here:
        return TextError(mark, "the file ends in the middle", "is it still being written, or cut off?")
    if here in "}]" and before.endswith(","):
        return TextError(mark, f'JSON allows no comma before "{here}"', "remove the comma")
    if here == "," and before.endswith(","):
        return TextError(mark, "two commas with nothing between them", "remove one")
    if here in "/#":
        return TextError(mark, "JSON has no comments", "write the file as YAML to have them")
    if problem.msg.startswith("Expecting property name"):
        return TextError(mark, "expected a key in double quotes", "JSON quotes every key")
    if problem.msg.startswith("Extra data"):
        return TextError(mark, "text after the end of the config", "a file holds one JSON object")
    return TextError(mark, f"not JSON: {problem.msg[:1].lower()}{problem.msg[1:]}", _hint(problem.msg))


def _hint(message: str) -> str:
    if "control character" in message:
        return "a line break or tab inside a text is written \\n or \\t; is the closing quote missing?"
    return "text needs double quotes" if message == "Expecting value" else ""
