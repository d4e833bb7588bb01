"""Fields that are set and that this version does not act on, as the schema marks them."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator

from pydantic import BaseModel

from offloadd.config.diagnostics import Diagnostic, note
from offloadd.config.known import MODELS
from offloadd.config.nodes import Node, Path, find
from offloadd.config.schema import NotYet


def notes(config: BaseModel, root: Node, quiet: Container[str] = ()) -> Iterator[tuple[Path, Diagnostic]]:
    """One note for each such field, at its key, and the path there; none for models that are known to be `quiet`."""
    for path, marker in _marked(config, (), quiet):
        entry, _ = find(root, path)
        yield path, note(entry.key, f"{path[-1]}: accepted, but {marker.message}")


def _marked(value: object, path: Path, quiet: Container[str] = ()) -> Iterator[tuple[Path, NotYet]]:
    if isinstance(value, BaseModel):
        for name in sorted(value.model_fields_set):
            yield from _marked_field(value, name, (*path, name), quiet)
    elif isinstance(value, dict):
        asked = value.items() if path != (MODELS,) else [item for item in value.items() if item[0] not in quiet]
        for key, item in asked:
            yield from _marked(item, (*path, key))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _marked(item, (*path, index))


def _marked_field(section: BaseModel, name: str, path: Path, quiet: Container[str]) -> Iterator[tuple[Path, NotYet]]:
    value = getattr(section, name)
    markers = _markers(type(section), name)
    yield from ((path, marker) for marker in markers if marker.when(value))
    if not markers:
        yield from _marked(value, path, quiet)


@functools.lru_cache(maxsize=1024)
def _markers(section: type[BaseModel], name: str) -> tuple[NotYet, ...]:
    return tuple(item for item in section.model_fields[name].metadata if isinstance(item, NotYet))
