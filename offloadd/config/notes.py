"""Fields that are set and that this version does not act on, as the schema marks them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pydantic import BaseModel

from offloadd.config.diagnostics import Diagnostic, note
from offloadd.config.nodes import Node, Path, find
from offloadd.config.schema import NotYet


def notes(config: BaseModel, root: Node) -> Iterator[Diagnostic]:
    """One note for each such field, at its key."""
    for path, marker in _marked(config, ()):
        entry, _ = find(root, path)
        yield note(entry.key, f"{path[-1]}: accepted, but {marker.message}")


def _marked(value: object, path: Path) -> Iterator[tuple[Path, NotYet]]:
    if isinstance(value, BaseModel):
        for name in sorted(value.model_fields_set):
            yield from _marked_field(value, name, (*path, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _marked(item, (*path, key))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _marked(item, (*path, index))


def _marked_field(section: BaseModel, name: str, path: Path) -> Iterator[tuple[Path, NotYet]]:
    value = getattr(section, name)
    markers = _markers(type(section), name)
    yield from ((path, marker) for marker in markers if marker.when(value))
    if not markers:
        yield from _marked(value, path)


@functools.lru_cache(maxsize=1024)
def _markers(section: type[BaseModel], name: str) -> tuple[NotYet, ...]:
    return tuple(item for item in section.model_fields[name].metadata if isinstance(item, NotYet))
