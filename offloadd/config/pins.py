"""Models that are fetched from a hub say which of their commits is meant: where their own code is run, and where the config asks.

A branch or a tag may be another tomorrow; a commit may not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Unpinned:
    """An engine that would fetch what nobody has named exactly."""

    adapter: str
    written: bool
    """Whether there is a `revision` that is no commit."""
    why: str


def unpinned(
    spec: ModelSpec, adapters: Mapping[BackendName, str], is_hub_id: Callable[[str], bool], required: bool
) -> Iterator[Unpinned]:
    """What the engines of one model leave open, each adapter once. `required`: by `storage.require_pinned`."""
    seen: set[str] = set()
    for engine in spec.backends:
        adapter = adapters.get(engine)
        if adapter is None or adapter in seen or not is_hub_id(spec.source_for(engine)):
            continue
        seen.add(adapter)
        options = spec.options.get(adapter)
        revision = getattr(options, "revision", None)
        runs_code = getattr(options, "trust_remote_code", False)
        if (required or runs_code) and not _COMMIT.fullmatch(revision or ""):
            why = "its code is run (trust_remote_code)" if runs_code else "storage.require_pinned is set"
            yield Unpinned(adapter, revision is not None, why)
