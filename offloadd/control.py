"""What the control plane sees and asks for: one picture of everything, the list of problems, a model's history, a reload."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from offloadd.api.meters import Meters
from offloadd.api.picture import ConfigStatus, Picture
from offloadd.api.problems import Problems, changed_at_start, of_listeners, of_memory, of_models, of_processes, of_sleep
from offloadd.catalog import Catalog
from offloadd.chronicle import Chronicle
from offloadd.clock import Clock
from offloadd.config import render_json
from offloadd.observe.snapshot import Observer
from offloadd.pictures import Pictures
from offloadd.registry.lives import LifeBook
from offloadd.runtime.reconciler import Reconciler
from offloadd.runtime.reload import ConfigStore, explain
from offloadd.runtime.signals import Signals
from offloadd.state.demand import Demand
from offloadd.state.history import History
from offloadd.state.ids import ModelName
from offloadd.state.observed import ObservedState
from offloadd.units import Seconds

STALLED = Seconds(30)
"""A reconcile loop that completed no cycle for so long makes no progress: /health answers 503."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where what is shown comes from."""

    store: ConfigStore
    pictures: Pictures
    reconciler: Reconciler
    catalog: Catalog
    observer: Observer
    chronicle: Chronicle
    lives: LifeBook
    signals: Signals


class ControlPlane:
    """Begins with the daemon: what the config said then is what is read at the start only. It is the API's `Control`."""

    def __init__(self, clock: Clock, meters: Meters, sources: Sources) -> None:
        self.meters = meters
        self._clock = clock
        self._sources = sources
        self._begun = sources.store.applied.desired
        self._started_wall = clock.wall()
        self._problems = Problems()
        self._asked: asyncio.Task[Picture] | None = None

    def look(self, *, closely: bool = False) -> Picture:
        """One reading of everything; `closely` by somebody who wants engines to be asked how busy they are from now on."""
        sources = self._sources
        if closely:
            sources.signals.look()
        now, wall = self._clock.now(), self._clock.wall()
        observed, demand = sources.pictures.observed(), sources.pictures.demand()
        return Picture(
            now=now,
            wall=wall,
            started_wall=self._started_wall,
            desired=sources.pictures.desired(),
            observed=observed,
            demand=demand,
            plan=sources.reconciler.latest,
            config=_status_of(sources.store),
            problems=self._problems.list(dict(self._found(observed, demand)), wall),
            alive=now - sources.reconciler.completed_at < STALLED,
            shelf=sources.catalog.shelf,
            totals=sources.chronicle.recorder.totals,
            signals=sources.signals.told(),
        )

    async def history(self, model: ModelName) -> History:
        """What one model did, as the registry remembers it."""
        return await self._sources.chronicle.history(model)

    async def reload(self) -> Picture:
        """Read the config again and apply it if it is good."""
        await self._sources.store.reload("POST /reload")
        return self.look()

    def reload_soon(self) -> None:
        """The same, not waited for; its outcome is in the log and in the next picture."""
        self._asked = asyncio.create_task(self.reload())

    def _found(self, observed: ObservedState, demand: Demand) -> Iterator[tuple[str, str]]:
        """What is wrong now, and what to do about each."""
        sources = self._sources
        store, latest = sources.store, sources.reconciler.latest
        yield from ((f"{what} {why}", "") for what, why in sources.observer.problems.items())
        yield from sources.chronicle.problems.items()
        if sources.lives.problem:
            yield sources.lives.problem, "see that the disk has room and that the data folder is writable"
        yield from sources.catalog.problems.items()
        if store.blind:
            hint = "it is looked at every 2 s all the same; raise fs.inotify.max_user_instances or max_user_watches"
            yield f"changes of the config bring no event: {store.blind}", hint
        if sources.reconciler.problem:
            yield f"the last reconcile cycle failed: {sources.reconciler.problem}", "this is a bug: see the log"
        for name in changed_at_start(self._begun, store.applied.desired):
            yield f"{name} was changed in the config and is still what it was at the start", "restart the daemon to change it"
        if not store.attempt.applied:
            text = "the last config was refused; the one before it is in force"
            yield text, "run offloadd check on it, correct it and reload"
        yield from of_models(latest)
        yield from of_memory(observed)
        yield from of_listeners(observed)
        yield from of_processes(observed)
        yield from of_sleep(observed, demand)


def _status_of(store: ConfigStore) -> ConfigStatus:
    attempt, applied = store.attempt, store.applied
    return ConfigStatus(
        generation=applied.desired.generation,
        applied_wall=applied.wall,
        attempt_wall=attempt.wall,
        attempt_ok=attempt.applied,
        message="" if attempt.applied else explain(attempt),
        diagnostics=render_json(attempt.diagnostics),
        shown=applied.shown,
    )
