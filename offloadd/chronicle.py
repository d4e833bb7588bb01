"""What happens to instances and requests, told to the registry: the loads, ends, peaks and days that `/models/{name}` shows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from offloadd.clock import Clock
from offloadd.observe.learning import is_news, learned
from offloadd.registry.database import Place
from offloadd.registry.recorder import Recorder
from offloadd.registry.store import Registry
from offloadd.state.desired import StorageSpec
from offloadd.state.found import Shelf
from offloadd.state.history import End, History, Load
from offloadd.state.ids import InstanceId, ModelName
from offloadd.state.launch import Candidate
from offloadd.state.observed import ExitRecord, InstanceView
from offloadd.units import Bytes, Instant, Seconds

FLUSH = Seconds(2)
"""So long what was told waits for more, to be written in one go."""
_HINT = "see that the disk has room and that the data folder is writable, or that the database server is up"


def registry_of(storage: StorageSpec) -> Registry:
    """The registry that the config names: a server, or the file in the data folder."""
    if storage.registry:
        return Registry(Place(url=storage.registry))
    return Registry(Place(file=Path(storage.data_dir) / "registry.db"))


class Chronicle:
    """One daemon's view of its registry."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._noted: set[InstanceId] = set()
        self.recorder = Recorder(registry, clock.wall)

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong with the registry, and what to do."""
        return {self._registry.problem: _HINT} if self._registry.problem else {}

    async def start(self) -> Shelf:
        """Read what is known; the models that were on disk."""
        await self.recorder.start()
        return await asyncio.to_thread(self._registry.found)

    async def attend(self) -> None:
        """Write what comes, a while after it came; where the registry has a problem, try whether it has passed."""
        if not self._registry.problem:
            await self.recorder.told.wait()
        await asyncio.sleep(FLUSH)
        await self.recorder.flush()

    async def close(self) -> None:
        """Write the rest, and close."""
        await self.recorder.flush()
        await asyncio.to_thread(self._registry.close)

    async def history(self, model: ModelName) -> History:
        """What the model did, up to this moment."""
        await self.recorder.flush()
        history = await asyncio.to_thread(self._registry.history, model)
        if self._registry.problem:
            self.recorder.told.set()  # so that it is tried again
        return history

    def learn(self, views: Iterable[InstanceView]) -> bool:
        """Keep what instances were seen to take, for the next launch of the same kind. Whether that was news."""
        known = self.recorder.footprints
        fresh = {key: footprint for key, footprint in learned(views).items() if is_news(footprint, known.get(key))}
        if fresh:
            self.recorder.learn(fresh)
        return bool(fresh)

    def rename(self, candidates: Iterable[Candidate]) -> bool:
        """Move footprints that an older offloadd kept under other keys. Whether there were any."""
        moved = {each.former_key: each.footprint_key for each in candidates if each.former_key}
        if moved:
            self.recorder.move(moved)
        return bool(moved)

    def note(self, view: InstanceView, size: Bytes | None, ends: Iterable[ExitRecord]) -> None:
        """An instance of files of this size has changed: whether it became ready, or ended, for the first time."""
        if view.ready_at is not None and view.adopted_at is None and view.id not in self._noted:
            self._noted.add(view.id)
            seconds = Seconds(view.ready_at - view.started_at)
            at = self._wall_of(view.ready_at)
            self.recorder.loaded(Load(model=view.model, backend=view.backend, at=at, seconds=seconds, size=size))
        for record in ends:
            if record.instance == view.id:
                self._noted.discard(view.id)
                self.recorder.ended(self._end(record, view))

    def _end(self, record: ExitRecord, view: InstanceView) -> End:
        return End(
            model=view.model,
            backend=record.backend,
            instance=str(record.instance),
            at=self._wall_of(record.at),
            kind=record.cause.kind,
            message=record.cause.message,
            expected=record.expected,
            ready_for=record.ready_for,
            peak=Bytes(sum(view.peak.values())) if view.peak else None,
        )

    def _wall_of(self, instant: Instant) -> float:
        return self._clock.wall() - (self._clock.now() - instant)
