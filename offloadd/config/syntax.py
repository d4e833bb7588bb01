"""YAML or JSON text to one Node tree with Marks. Which of the two it is shows in the text, not in the file's name."""

from __future__ import annotations

from collections.abc import Sequence

from offloadd.config.diagnostics import Diagnostic, error
from offloadd.config.json_syntax import looks_like_json, parse_json
from offloadd.config.limits import TextError
from offloadd.config.nodes import Node, merge
from offloadd.config.source import MAX_TEXT, SourceText
from offloadd.config.yaml_syntax import parse_yaml


def parse(source: SourceText) -> tuple[Node | None, list[Diagnostic]]:
    """Read one text. The tree is there, as far as it goes, unless it could not be read to its end."""
    problems: list[Diagnostic] = []
    try:
        return _parse(source, problems), problems
    except TextError as fault:
        return None, [*problems, fault.diagnostic]


def parse_all(sources: Sequence[SourceText]) -> tuple[Node | None, list[Diagnostic]]:
    """Read every text and lay them over one another; no tree when any of them could not be read to its end."""
    problems: list[Diagnostic] = []
    roots: list[Node] = []
    for source in sources:
        root, found = parse(source)
        problems.extend(found)
        if root is not None:
            roots.append(root)
    if len(roots) < len(sources):
        return None, problems
    return merge(roots, problems), problems


def _parse(source: SourceText, problems: list[Diagnostic]) -> Node | None:
    if len(source.text) > MAX_TEXT:
        raise TextError(source.start, f"the file has more than {MAX_TEXT:,} characters")
    text = SourceText(source.name, source.text.removeprefix("\ufeff"))
    root = parse_json(text, problems) if looks_like_json(text.text) else parse_yaml(text, problems)
    if root is None or root.value is None:
        # Read as "no models" it would stop everything that runs.
        raise TextError(source.start, "the file is empty", "write {} for a config that has only defaults")
    if not isinstance(root.value, dict):
        problems.append(error(root.mark, "a config is a mapping, such as models: {…}"))
        return None
    return root
