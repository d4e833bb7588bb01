"""The tree that every spelling of a config becomes: plain values, each with its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from offloadd.config.diagnostics import Diagnostic, error
from offloadd.config.source import Mark

Scalar = None | bool | int | float | str
Path = tuple[str | int, ...]
"""Keys and list indexes from the root to a value."""


class Node(NamedTuple):
    """One value and where it begins; `last_line` is where it ends."""

    value: Scalar | list[Node] | dict[str, Entry]
    mark: Mark
    last_line: int


class Entry(NamedTuple):
    """A key's place, and its value."""

    key: Mark
    node: Node


class Pair(NamedTuple):
    """A key as it was read, before anybody looked for duplicates."""

    name: str
    key: Mark
    node: Node


def mapping(pairs: Iterable[Pair], problems: list[Diagnostic]) -> dict[str, Entry]:
    """Join pairs, the first of equal keys winning; report every other one with both places."""
    entries: dict[str, Entry] = {}
    for name, key, node in pairs:
        first = entries.setdefault(name, Entry(key, node))
        if first.key is not key:
            problems.append(_set_twice(name, key, first.key))
    return entries


def merge(roots: Iterable[Node], problems: list[Diagnostic]) -> Node | None:
    """Lay trees of mappings over one another; a key that is set twice is reported, and the first one stays."""
    merged: Node | None = None
    for root in roots:
        merged = root if merged is None else _merge_two(merged, root, problems)
    return merged


def find(root: Node, path: Path) -> tuple[Entry, Path]:
    """The value at `path`, or the nearest one above it that exists, and the path that led there.

    An item of a list has no key: its own place stands for it.
    """
    here = Entry(root.mark, root)
    for depth, step in enumerate(path):
        below = _child(here.node, step)
        if below is None:
            return here, path[:depth]
        here = below
    return here, path


def _child(node: Node, step: str | int) -> Entry | None:
    value = node.value
    if isinstance(value, dict) and isinstance(step, str):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value):
        return Entry(value[step].mark, value[step])
    return None


def _merge_two(left: Node, right: Node, problems: list[Diagnostic]) -> Node:
    if not isinstance(left.value, dict) or not isinstance(right.value, dict):
        raise TypeError("only mappings merge")
    entries = dict(left.value)
    for name, entry in right.value.items():
        first = entries.get(name)
        if first is None:
            entries[name] = entry
        elif isinstance(first.node.value, dict) and isinstance(entry.node.value, dict):
            entries[name] = Entry(first.key, _merge_two(first.node, entry.node, problems))
        else:
            problems.append(_set_twice(name, entry.key, first.key))
    return left._replace(value=entries)


def _set_twice(name: str, again: Mark, first: Mark) -> Diagnostic:
    return error(again, f'"{name}" is set twice; the first time at {first}', "keep one of the two")
