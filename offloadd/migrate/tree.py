"""Reading a foreign YAML file: plain values, each still with its line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offloadd.config.diagnostics import Diagnostic
from offloadd.config.limits import TextError
from offloadd.config.nodes import Entry, Node
from offloadd.config.source import MAX_TEXT, SourceText
from offloadd.config.yaml_syntax import parse_yaml
from offloadd.errors import PermanentError


def read_text(path: Path) -> str:
    """A text file of a bounded size; PermanentError when there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise PermanentError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PermanentError(f"{path} is not a text file") from None
    if len(text) > MAX_TEXT:
        raise PermanentError(f"{path} has more than {MAX_TEXT:,} characters")
    return text


def read_yaml(path: Path) -> Node:
    """The file's tree; PermanentError with the place when it is not YAML, or no mapping."""
    problems: list[Diagnostic] = []
    try:
        root = parse_yaml(SourceText(str(path), read_text(path)), problems)
    except TextError as error:
        raise PermanentError(str(error.diagnostic), hint=error.diagnostic.hint) from None
    if problems:
        raise PermanentError(str(problems[0]), hint=problems[0].hint)
    if root is None or not isinstance(root.value, dict):
        raise PermanentError(f"{path} is not a mapping of settings")
    return root


def entries(node: Node) -> Iterator[tuple[str, Entry]]:
    """Keys of a mapping; nothing for any other value."""
    yield from (node.value.items() if isinstance(node.value, dict) else ())


def items(node: Node) -> Iterator[Node]:
    """Members of a list; nothing for any other value."""
    yield from (node.value if isinstance(node.value, list) else ())


def plain(node: Node) -> Any:
    """The value without places."""
    if isinstance(node.value, dict):
        return {key: plain(entry.node) for key, entry in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value
