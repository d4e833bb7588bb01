"""YAML text to a Node tree, with YAML 1.2 core scalars: `on` and `1:30` are text, `0o17` is 15.

Only PyYAML's event parser is used: its resolver is YAML 1.1, and its composer recurses before anything can be counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from offloadd.config.diagnostics import Diagnostic, error
from offloadd.config.limits import TextError, check_count, check_depth, real_number, whole_number, whole_text
from offloadd.config.nodes import Node, Pair, Scalar, mapping
from offloadd.config.source import Mark, SourceText

# The one around libyaml is ten times as fast, and not in every build of PyYAML.
_PARSER: Any = yaml.CBaseLoader if yaml.__with_libyaml__ else yaml.BaseLoader
_CORE = "tag:yaml.org,2002:"
_STR, _INT, _FLOAT, _BOOL, _NULL, _SEQ, _MAP = (_CORE + name for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_NO_TAG = (None, "!")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_NUMBER_START = frozenset("0123456789+-.")
_INT_TEXT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT_TEXT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def parse_yaml(source: SourceText, problems: list[Diagnostic]) -> Node | None:
    """Read one YAML text, None when it holds no value; raise TextError at the first place that is not YAML."""
    _check_characters(source)
    try:
        return _Build(source, problems).document()
    except yaml.MarkedYAMLError as problem:
        raise _explained(source, problem) from None
    except yaml.YAMLError as problem:
        raise TextError(source.start, f"not YAML: {problem}") from None


class _Anchored(NamedTuple):
    """A value that aliases may bring back, and what each use of it costs."""

    node: Node
    size: int
    height: int


class _Build:
    """Makes nodes of the parser's events."""

    def __init__(self, source: SourceText, problems: list[Diagnostic]) -> None:
        self._file = source.name
        self._problems = problems
        self._events: Iterator[Any] = yaml.parse(source.text, Loader=_PARSER)
        self._anchors: dict[str, _Anchored] = {}
        self._count = 0
        self._deepest = 0

    def document(self) -> Node | None:
        """The only document of the stream."""
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        root = self._value(next(self._events), 0)
        next(self._events)  # the document's end
        after = next(self._events)
        if isinstance(after, yaml.DocumentStartEvent):
            raise TextError(self._mark(after), "a second document begins here", "a file holds one: remove the --- line")
        return root

    def _value(self, event: Any, depth: int) -> Node:
        mark = self._mark(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), mark, depth)
        if event.anchor is None:
            return self._plain_value(event, mark, depth)
        before, outer = self._count, self._deepest
        self._deepest = depth
        node = self._plain_value(event, mark, depth)
        self._anchors[event.anchor] = _Anchored(node, self._count - before, self._deepest - depth)
        self._deepest = max(outer, self._deepest)
        return node

    def _plain_value(self, event: Any, mark: Mark, depth: int) -> Node:
        self._spend(1, depth, mark)
        if isinstance(event, yaml.ScalarEvent):
            end: Any = event.end_mark
            return Node(self._scalar(event, mark), mark, end.line + 1)
        self._spend(0, depth + 1, mark)
        if isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event.tag, mark, _SEQ)
            return Node(list(self._items(depth + 1)), mark, mark.line)
        self._check_tag(event.tag, mark, _MAP)
        return Node(mapping(self._pairs(depth + 1), self._problems), mark, mark.line)

    def _alias(self, name: str, mark: Mark, depth: int) -> Node:
        """The very node it names, which costs as much again: whoever walks the tree meets it twice."""
        found = self._anchors.get(name)
        if found is None:
            raise TextError(mark, f"no anchor &{name} above this alias", "a text that starts with * needs quotes")
        self._spend(found.size, depth + found.height, mark)
        return found.node

    def _spend(self, count: int, depth: int, mark: Mark) -> None:
        self._count += count
        self._deepest = max(self._deepest, depth)
        check_count(self._count, mark)
        check_depth(depth, mark)

    def _items(self, depth: int) -> Iterator[Node]:
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self._value(event, depth)

    def _pairs(self, depth: int) -> Iterator[Pair]:
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                return
            mark = self._mark(event)
            name = self._key(event, mark, depth)
            value = self._value(next(self._events), depth)
            if name is not None:
                yield Pair(name, mark, value)

    def _key(self, event: Any, mark: Mark, depth: int) -> str | None:
        """A key is its text: `0: …` under budget.gpus names the device "0"."""
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, depth)
            self._problems.append(error(mark, "a key is a name, not a list, a mapping or an alias"))
            return None
        self._spend(1, depth, mark)
        if event.value == "<<" and event.implicit[0]:
            hint = "write the keys out, or repeat one value with an anchor and an alias (&name, *name)"
            self._problems.append(error(mark, 'merge keys ("<<") are not supported', hint))
            return None
        self._check_tag(event.tag, mark, _STR)
        text: str = event.value
        return whole_text(text, mark)

    def _scalar(self, event: Any, mark: Mark) -> Scalar:
        text: str = event.value
        tag = (_plain_tag(text) if event.implicit[0] else _STR) if event.tag in _NO_TAG else event.tag
        if tag == _STR:
            return whole_text(text, mark)
        if tag in (_NULL, _BOOL) and text in _WORDS:
            return _WORDS[text]
        if tag == _INT and _INT_TEXT.fullmatch(text):
            return whole_number(text, mark, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if tag == _FLOAT and _FLOAT_TEXT.fullmatch(text):
            return real_number(text.lower(), mark)
        self._check_tag(tag, mark, "")
        return text

    def _check_tag(self, tag: str | None, mark: Mark, expected: str) -> None:
        if tag not in (*_NO_TAG, expected):
            name = str(tag).replace(_CORE, "!!")
            self._problems.append(error(mark, f"the tag {name} does not fit here", "values need no tags: remove it"))

    def _mark(self, event: Any) -> Mark:
        start = event.start_mark
        return Mark(self._file, start.line + 1, start.column + 1)


def _plain_tag(text: str) -> str:
    if text in _WORDS:
        return _NULL if _WORDS[text] is None else _BOOL
    if text[0] not in _NUMBER_START:
        return _STR
    if _INT_TEXT.fullmatch(text):
        return _INT
    return _FLOAT if _FLOAT_TEXT.fullmatch(text) else _STR


def _check_characters(source: SourceText) -> None:
    found = _UNREADABLE.search(source.text)
    if found:
        before = source.text[: found.start()]
        mark = Mark(source.name, before.count("\n") + 1, found.start() - before.rfind("\n"))
        raise TextError(mark, f"the control character U+{ord(found[0]):04X} cannot stand in a config", "remove it")


def _explained(source: SourceText, problem: yaml.MarkedYAMLError) -> TextError:
    """PyYAML's finding in words that help someone who is not a YAML expert."""
    said = problem.problem or problem.context or "not YAML"
    spot = problem.problem_mark or problem.context_mark
    opened = problem.context_mark
    here = Mark(source.name, spot.line + 1, spot.column + 1) if spot else source.start
    start = Mark(source.name, opened.line + 1, opened.column + 1) if opened else here
    return _explained_scanner(source, said, here, start) or TextError(here, *_WORDING.get(said, (f"not YAML: {said}", "")))


def _explained_scanner(source: SourceText, said: str, here: Mark, start: Mark) -> TextError | None:
    if "cannot start any token" in said:
        char = _char_at(source, here)
        if char == "\t":
            return TextError(here, "a tab cannot indent YAML", "use spaces")
        return TextError(here, f'a value cannot start with "{char}"', "put it in quotes")
    if "unexpected end of stream" in said and _char_at(source, start) in "\"'":
        return TextError(start, "this quote is never closed", "close it, or is the file cut off?")
    if said.startswith(("did not find expected ',' or", "expected ',' or")):
        opening = _char_at(source, start)
        said = f'expected "," or the end of what "{opening}" opened at {start}'
        return TextError(here, said, "is the closing bracket missing?")
    if "indentation" in said or "expected key" in said or "<block end>" in said or "expected '-' indicator" in said:
        return TextError(here, "this does not line up with what began above", f"check the indentation against {start}")
    return None


def _char_at(source: SourceText, mark: Mark) -> str:
    lines = source.text.split("\n")
    line = lines[mark.line - 1] if mark.line <= len(lines) else ""
    return line[mark.column - 1 : mark.column] or " "


_COLON_HINT = 'put a value that holds ": " in quotes, or check the indentation'
_WORDING = {
    "mapping values are not allowed in this context": ('unexpected ":"', _COLON_HINT),
    "mapping values are not allowed here": ('unexpected ":"', _COLON_HINT),
    "could not find expected ':'": ("expected key: value", "is a colon, or a space after it, missing?"),
}
