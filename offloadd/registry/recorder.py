"""Gathers what is to be remembered on the event loop, and writes it in batches from a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from offloadd.registry.batch import Batch
from offloadd.registry.store import Registry, day_of
from offloadd.state.found import Found
from offloadd.state.history import End, Load, Usage
from offloadd.state.ids import ModelName
from offloadd.state.launch import Footprint
from offloadd.state.served import Fate, Served

MAX_MODELS = 10_000
"""Models whose totals are held; a client cannot make up more, since only requests of known models are counted."""


class Recorder:
    """Whatever it is told is on disk at the next `flush` that can write; until then it waits, within bounds."""

    def __init__(self, registry: Registry, wall: Callable[[], float]) -> None:
        self._registry = registry
        self._wall = wall
        self._waiting = Batch()
        self._turn = asyncio.Lock()
        self._read_at = 0
        self.footprints: dict[str, Footprint] = {}
        """Everything learned, by key: what is on disk and what is on its way there."""
        self.totals: dict[ModelName, Usage] = {}
        """Everything that each model did, this day's requests included."""

    async def start(self) -> None:
        """Read what is known."""
        await asyncio.to_thread(self._read)

    def learn(self, found: Mapping[str, Footprint]) -> None:
        """Remember peaks."""
        self._waiting.footprints.update(found)
        self.footprints = {**self.footprints, **found}

    def move(self, keys: Mapping[str, str]) -> None:
        """Footprints that an older offloadd kept under other keys."""
        self._waiting.moved.update(keys)
        moved = {new: self.footprints[old] for old, new in keys.items() if old in self.footprints}
        self.footprints = {**{key: footprint for key, footprint in self.footprints.items() if key not in keys}, **moved}

    def loaded(self, load: Load) -> None:
        """A launch became ready."""
        self._waiting.loads.append(load)

    def ended(self, end: End) -> None:
        """An instance ended."""
        self._waiting.ends.append(end)

    def found(self, changed: Mapping[str, Found | None]) -> None:
        """Models on disk that are new, have changed or are gone."""
        self._waiting.found.update(changed)

    def served(self, served: Served) -> None:
        """A request is over. Those that named no model that there is belong to nobody's history."""
        if served.model is None or (served.model not in self.totals and len(self.totals) >= MAX_MODELS):
            return
        usage = usage_of(served)
        self._waiting.count(served.model, day_of(self._wall()), usage)
        self.totals[served.model] = self.totals.get(served.model, Usage()).plus(usage)

    async def flush(self) -> bool:
        """Write what waits. False when it could not be written, and waits on."""
        async with self._turn:
            batch, self._waiting = self._waiting, Batch()
            if not batch and not self._registry.problem:
                return True
            written = await asyncio.to_thread(self._registry.write, batch, self._wall())
            if not written:
                self._waiting = batch.before(self._waiting)
            elif self._registry.opened != self._read_at:
                await asyncio.to_thread(self._read)  # it could not be read before
            return written

    def _read(self) -> None:
        self._read_at = self._registry.opened
        self.footprints = {**self._registry.footprints(), **self.footprints}
        known = self._registry.totals()
        self.totals = {**self.totals, **known}


def usage_of(served: Served) -> Usage:
    """One request as a part of its day."""
    return Usage(
        answered=int(served.fate is Fate.ANSWERED),
        refused=int(served.fate is Fate.REFUSED),
        cancelled=int(served.fate is Fate.CANCELLED),
        failed=int(served.fate is Fate.FAILED),
        prompt_tokens=served.prompt_tokens or 0,
        cached_tokens=served.cached_tokens or 0,
        completion_tokens=served.completion_tokens or 0,
        seconds=served.duration,
    )
