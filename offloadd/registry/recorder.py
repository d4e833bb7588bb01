"""Gathers what is to be remembered on the event loop, and writes it in batches from a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from offloadd.registry.batch import Batch
from offloadd.registry.store import Registry, day_of
from offloadd.state.found import Found
from offloadd.state.history import End, Load, Usage
from offloadd.state.ids import ModelName
from offloadd.state.launch import Footprint
from offloadd.state.served import Fate, Served

_DAY_S = 86400
_PLACES = {fate.value: Usage.__slots__.index(fate.value) for fate in Fate}
_PROMPT = Usage.__slots__.index("prompt_tokens")
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
        self.told = asyncio.Event()
        """Set while something waits to be written."""
        self.footprints: dict[str, Footprint] = {}
        """Everything learned, by key: what is on disk and what is on its way there."""
        self._totals: dict[ModelName, Usage] = {}
        self._fresh: dict[tuple[ModelName, int], list[Any]] = {}
        """Usage of each model on each day that is in no total yet: a request adds to plain numbers, in the order of `Usage`."""

    async def start(self) -> None:
        """Read what is known."""
        await asyncio.to_thread(self._read)

    def learn(self, found: Mapping[str, Footprint]) -> None:
        """Remember peaks."""
        self._waiting.footprints.update(found)
        self.told.set()
        self.footprints = {**self.footprints, **found}

    def move(self, keys: Mapping[str, str]) -> None:
        """Footprints that an older offloadd kept under other keys."""
        self._waiting.moved.update(keys)
        self.told.set()
        moved = {new: self.footprints[old] for old, new in keys.items() if old in self.footprints}
        self.footprints = {**{key: footprint for key, footprint in self.footprints.items() if key not in keys}, **moved}

    def loaded(self, load: Load) -> None:
        """A launch became ready."""
        self._waiting.loads.append(load)
        self.told.set()

    def ended(self, end: End) -> None:
        """An instance ended."""
        self._waiting.ends.append(end)
        self.told.set()

    def found(self, changed: Mapping[str, Found | None]) -> None:
        """Models on disk that are new, have changed or are gone."""
        self._waiting.found.update(changed)
        self.told.set()

    def served(self, served: Served) -> None:
        """A request is over. Those that named no model that there is belong to nobody's history."""
        model = served.model
        if model is None:
            return
        key = (model, int(self._wall() // _DAY_S))
        sums = self._fresh.get(key)
        if sums is None:
            if model not in self._totals and len(self._totals) + len(self._fresh) >= MAX_MODELS:
                return
            sums = self._fresh[key] = [0] * len(Usage.__slots__)
            self.told.set()
        sums[_PLACES[served.fate._value_]] += 1  # as `value` says, without a call
        sums[_PROMPT] += served.prompt_tokens or 0
        sums[_PROMPT + 1] += served.cached_tokens or 0
        sums[_PROMPT + 2] += served.completion_tokens or 0
        sums[_PROMPT + 3] += served.duration

    @property
    def totals(self) -> Mapping[ModelName, Usage]:
        """Everything that each model did, this day's requests included."""
        self._sum_up()
        return self._totals

    def _sum_up(self) -> None:
        fresh, self._fresh = self._fresh, {}
        for (model, day), sums in fresh.items():
            usage = Usage(**dict(zip(Usage.__slots__, sums, strict=True)))
            self._waiting.count(model, day_of(day * _DAY_S), usage)
            self._totals[model] = self._totals.get(model, Usage()).plus(usage)

    async def flush(self) -> bool:
        """Write what waits. False when it could not be written, and waits on."""
        async with self._turn:
            self._sum_up()
            batch, self._waiting = self._waiting, Batch()
            self.told.clear()
            if not batch and not self._registry.problem:
                return True
            written = await asyncio.to_thread(self._registry.write, batch, self._wall())
            if not written:
                self._waiting = batch.before(self._waiting)
                self.told.set()
            elif self._registry.opened != self._read_at:
                await asyncio.to_thread(self._read)  # it could not be read before
            return written

    def _read(self) -> None:
        self._read_at = self._registry.opened
        self.footprints = {**self._registry.footprints(), **self.footprints}
        known = self._registry.totals()
        self._totals = {**self._totals, **known}
