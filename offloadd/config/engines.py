"""Which engines there are for a config to name, and what each can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from offloadd.backends.base import Backend
from offloadd.state.desired import BackendKind

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Builtin:
    """A built-in engine as far as configs go."""

    name: str
    command: tuple[str, ...]
    preference: int
    adapter: Backend


def builtins(backends: Mapping[str, Backend]) -> dict[str, Builtin]:
    """Every built-in engine by name, the best first."""
    known = {
        name: Builtin(name, adapter.default_command, adapter.preference, adapter)
        for name, adapter in backends.items()
        if adapter.kind is BackendKind.BUILTIN
    }
    return dict(sorted(known.items(), key=lambda item: (item[1].preference, item[0])))


def is_hub_id(source: str, backends: Mapping[str, Backend]) -> bool:
    """Whether `source` is `ORG/NAME` rather than a file in a folder, which an ending that an engine reads tells."""
    return _HUB_ID.fullmatch(source) is not None and not _claimed(source, backends)


def can_read(engine: Builtin, source: str, backends: Mapping[str, Backend]) -> bool:
    """Whether `engine` can load `source`, as far as its name tells."""
    if is_hub_id(source, backends):
        return engine.adapter.reads_hub_ids
    return source.lower().endswith(engine.adapter.reads) if engine.adapter.reads else not _claimed(source, backends)


def _claimed(source: str, backends: Mapping[str, Backend]) -> bool:
    endings = tuple(ending for adapter in backends.values() for ending in adapter.reads)
    return bool(endings) and source.lower().endswith(endings)
