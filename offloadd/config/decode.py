"""Node tree to schema: fills in `${…}`, validates, and gives every finding its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from offloadd.backends.base import Backend
from offloadd.config.diagnostics import Diagnostic, did_you_mean, error
from offloadd.config.known import Known, put_back, without
from offloadd.config.nodes import Node, Path, find
from offloadd.config.schema import ConfigFile
from offloadd.config.secrets import Secrets, expand, is_secret_name
from offloadd.config.section import Section
from offloadd.config.sections import config_model
from offloadd.config.source import Mark
from offloadd.config.wording import describe, sentence

MAX_REPORTED = 100
"""Findings that are worded; after so many, more of them help nobody."""
_MAX_ROUNDS = 4
_KEY = "[key]"
"""How the validation library points at a mapping's key rather than its value."""


@dataclass(slots=True)
class Decoded:
    """What could be read. `config` lacks what was wrong, and `dropped` says what that is."""

    config: ConfigFile | None = None
    dropped: set[Path] = field(default_factory=set)
    problems: list[Diagnostic] = field(default_factory=list)

    def is_whole(self, path: Path) -> bool:
        """Whether nothing at `path`, above it or below it was dropped: else what follows from it is not worth saying."""
        return not any(gone[: len(path)] == path[: len(gone)] for gone in self.dropped)


def decode(root: Node, *, backends: Mapping[str, Backend], secrets: Secrets, same: Mapping[str, Known] | None = None) -> Decoded:
    """Validate a tree whose root is a mapping.

    What is wrong is reported and dropped, and the rest validated again, so that references in it can be checked too. Models that
    are the `same` as before are not read again: the validation library takes what it has made before as it is.
    """
    known = same or {}
    decoded = Decoded()
    filled = _Filler(secrets, decoded.problems)
    data = filled.plain(without(root, known), ())
    put_back(data, root, {name: each.section for name, each in known.items()})
    decoded.dropped.update(filled.failed)
    model = config_model(backends)
    for turn in range(_MAX_ROUNDS):
        try:
            decoded.config = model.model_validate(data)
            break
        except ValidationError as problem:
            findings = problem.errors(include_url=False, include_input=False)
        if turn == 0:
            decoded.problems.extend(_Reader(root, model, filled).worded(findings))
        cuts = sorted({_cut(finding) for finding in findings}, key=len, reverse=True)
        decoded.dropped.update(cuts)
        for cut in cuts:
            _drop(data, cut)
    return decoded


class _Filler:
    """Makes plain data of nodes, references filled in."""

    def __init__(self, secrets: Secrets, problems: list[Diagnostic]) -> None:
        self._secrets = secrets
        self._problems = problems
        self.failed: set[Path] = set()
        self.changed: set[Path] = set()

    def plain(self, node: Node, path: Path) -> Any:
        """The value without places; fresh containers, so that the caller may change them."""
        value = node.value
        if isinstance(value, dict):
            return {name: self.plain(entry.node, (*path, name)) for name, entry in value.items()}
        if isinstance(value, list):
            return [self.plain(item, (*path, index)) for index, item in enumerate(value)]
        return self._text(value, node.mark, path) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, mark: Mark, path: Path) -> str:
        try:
            filled = expand(text, self._secrets)
        except ValueError as problem:
            self._problems.append(error(mark, str(problem)))
            self.failed.add(path)
            return text
        if filled != text:
            self.changed.add(path)
        return filled


class _Reader:
    """Words findings and places them."""

    def __init__(self, root: Node, model: type[ConfigFile], filled: _Filler) -> None:
        self._root = root
        self._model = model
        self._filled = filled

    def worded(self, findings: list[ErrorDetails]) -> Iterator[Diagnostic]:
        """A diagnostic for each, up to a bound."""
        below = {finding["loc"][:-1] for finding in findings}
        strangers: dict[Path, list[str]] = {}
        for finding in findings:
            if finding["type"] == "extra_forbidden":
                strangers.setdefault(finding["loc"][:-1], []).append(str(finding["loc"][-1]))
        worth_saying = (finding for finding in findings if not self._follows(finding, below, strangers))
        yield from map(self._one, itertools.islice(worth_saying, MAX_REPORTED))
        if next(worth_saying, None):
            yield error(self._root.mark, f"more than {MAX_REPORTED} problems; the others are not listed")

    def _follows(self, finding: ErrorDetails, below: set[Path], strangers: Mapping[Path, list[str]]) -> bool:
        """Whether it only follows from another: a reference not found, a bad item in a list, a key misspelled."""
        path = finding["loc"]
        if path in self._filled.failed:
            return True
        if finding["type"] == "too_short":
            return path in below
        if finding["type"] == "missing":
            return any(did_you_mean(name, [str(path[-1])]) for name in strangers.get(path[:-1], ())[:10])
        return False

    def _one(self, finding: ErrorDetails) -> Diagnostic:
        path, kind = finding["loc"], finding["type"]
        if kind == "extra_forbidden":
            return self._unknown_key(path)
        if kind == "missing":
            return self._missing(path)
        context = finding.get("ctx", {})
        if path and path[-1] == _KEY:
            entry, _ = find(self._root, path[:-1])
            return error(entry.key, f'"{path[-2]}": {context.get("problem", finding["msg"])}')
        entry, reached = find(self._root, (*path, *filter(None, [context.get("at", "")])))
        message, hint = sentence(kind, context, finding["msg"], entry.node, self._found(entry.node, reached))
        if reached in self._filled.changed:
            # What a reference stands for may be a secret: neither it nor a sentence made from it is said.
            message, hint = f"what {_reference(entry.node)} stands for is not accepted here", ""
        return error(entry.node.mark, f"{_label(reached)}{message}", hint)

    def _found(self, node: Node, path: Path) -> str:
        return "" if any(is_secret_name(step) for step in path) else describe(node)

    def _unknown_key(self, path: Path) -> Diagnostic:
        entry, _ = find(self._root, path)
        known = _known_keys(self._model, path[:-1])
        near = did_you_mean(str(path[-1]), known)
        hint = "" if near or not known else f"known here: {', '.join(known)}"
        return error(entry.key, f'unknown key "{str(path[-1])[:60]}"{_inside(path[:-1])}{near}', hint)

    def _missing(self, path: Path) -> Diagnostic:
        entry, _ = find(self._root, path[:-1])
        return error(entry.key, f'"{path[-1]}" is missing{_inside(path[:-1])}')


def _known_keys(model: type[Section], path: Path) -> list[str]:
    """Keys that the section at `path` has; none where any key goes."""
    here: type[Section] | None = model
    inside_items = False
    for step in path:
        if inside_items:
            inside_items = False  # this step names one item, all of which are alike
        elif here is None or str(step) not in here.model_fields:
            return []
        else:
            annotation = here.model_fields[str(step)].annotation
            inside_items = get_origin(annotation) in (dict, tuple)
            here = _section_in(annotation)
    return list(here.model_fields) if here else []


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_in(part)
        if found is not None:
            return found
    return None


def _cut(finding: ErrorDetails) -> Path:
    """What to leave out so that the rest may be valid: the value, its mapping where a key is missing, a list as a whole."""
    path = finding["loc"]
    if finding["type"] == "missing" or path[-1:] == (_KEY,):
        path = path[:-1]
    return next((path[:depth] for depth, step in enumerate(path) if isinstance(step, int)), path)


def _drop(data: Any, path: Path) -> None:
    for step in path[:-1]:
        if not isinstance(data, dict) or step not in data:
            return
        data = data[step]
    if isinstance(data, dict) and path:
        data.pop(path[-1], None)


def _label(path: Path) -> str:
    """The last key on the way, which a log line needs: it shows no source line."""
    name = next((step for step in reversed(path) if isinstance(step, str)), "")
    return f"{name[:60]}: " if name else ""


def _inside(path: Path) -> str:
    return f" in {'.'.join(str(step) for step in path)[:120]}" if path else ""


def _reference(node: Node) -> str:
    return f'"{node.value[:60]}"' if isinstance(node.value, str) else "the reference"
