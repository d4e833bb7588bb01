r"""JSON text to a Node tree.

The standard parser decides what is JSON. It keeps no places, so a second walk over the tokens, now known to be in order,
builds the tree. The YAML parser could not do that: JSON allows tabs, a line break before a colon and `\ud83d\ude00`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator

from offloadd.config.diagnostics import Diagnostic
from offloadd.config.limits import TextError, check_count, check_depth, real_number, whole_number, whole_text
from offloadd.config.nodes import Node, Pair, Scalar, mapping
from offloadd.config.source import Mark, SourceText

_TOKEN = re.compile(r'[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|[^\s{}\[\],:"]+)')
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
    return _Walk(source, problems).value(1)


class _Walk:
    """Builds nodes from the tokens of a text that is known to be JSON."""

    def __init__(self, source: SourceText, problems: list[Diagnostic]) -> None:
        self._file = source.name
        self._problems = problems
        self._tokens = _TOKEN.finditer(source.text)
        self._lines = [0, *(found.end() for found in re.finditer("\n", source.text))]
        self._count = 0

    def value(self, depth: int) -> Node:
        """The next value."""
        return self._value(*self._next(), depth)

    def _value(self, word: str, mark: Mark, depth: int) -> Node:
        self._count += 1
        check_count(self._count, mark)
        if word == "{":
            check_depth(depth, mark)
            return Node(mapping(list(self._pairs(depth)), self._problems), mark, mark.line)
        if word == "[":
            check_depth(depth, mark)
            return Node(list(self._items(depth)), mark, mark.line)
        return Node(_scalar(word, mark), mark, mark.line)

    def _pairs(self, depth: int) -> Iterator[Pair]:
        word, mark = self._next()
        while word != "}":
            if word == ",":
                word, mark = self._next()
            self._next()  # the colon
            yield Pair(whole_text(json.loads(word), mark), mark, self.value(depth + 1))
            word, mark = self._next()

    def _items(self, depth: int) -> Iterator[Node]:
        word, mark = self._next()
        while word != "]":
            if word == ",":
                word, mark = self._next()
            yield self._value(word, mark, depth + 1)
            word, mark = self._next()

    def _next(self) -> tuple[str, Mark]:
        found = next(self._tokens)
        start = found.start(1)
        line = bisect_right(self._lines, start)
        return found[1], Mark(self._file, line, start - self._lines[line - 1] + 1)


def _scalar(word: str, mark: Mark) -> Scalar:
    if word[0] == '"':
        return whole_text(json.loads(word), mark) if "\\" in word else word[1:-1]
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
