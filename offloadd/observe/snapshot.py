"""Joins the readings into one ObservedState. Slow readings are taken in the background; joining them is quick and never waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from offloadd.backends.base import Backend, fingerprint
from offloadd.observe.devices import DeviceReader
from offloadd.observe.engines import EngineFinder
from offloadd.observe.processes import own_memory, read_children, tree
from offloadd.observe.sources import read_facts
from offloadd.state.desired import DesiredState, Engine, ModelSpec
from offloadd.state.ids import HOST_RAM, BackendName, DeviceId, InstanceId, ModelName
from offloadd.state.launch import Candidate, ModelFacts
from offloadd.state.observed import DeviceView, EngineView, ObservedState
from offloadd.units import Bytes, Seconds

T = TypeVar("T")

READ_TIMEOUT = Seconds(5)


class Observer:
    """Keeps the latest readings. A reading that fails or is late leaves its device out, which the planner takes as unknown."""

    def __init__(self, readers: Sequence[DeviceReader], backends: Mapping[str, Backend]) -> None:
        self._readers = readers
        self._backends = backends
        self._finder = EngineFinder(backends)
        self._busy: set[str] = set()
        self._peaks: dict[InstanceId, dict[DeviceId, Bytes]] = {}
        self._facts: dict[str, ModelFacts] = {}
        self.devices: dict[DeviceId, DeviceView] = {}
        self.engines: dict[BackendName, EngineView] = {}
        self.measured: dict[InstanceId, dict[DeviceId, Bytes]] = {}
        self.candidates: dict[ModelName, tuple[Candidate, ...]] = {}
        self.problems: dict[str, str] = {}

    async def refresh(self, desired: DesiredState, pids: Mapping[InstanceId, int]) -> bool:
        """Read everything again for this config and these processes; True when something the planner weighs is different."""
        before = (self.candidates, {key: view.total for key, view in self.devices.items()})
        sources = sorted({spec.source_for(name) for spec in desired.models.values() for name in spec.backends})
        views = await asyncio.gather(*(self._finder.look(engine) for engine in desired.engines.values()))
        self.engines = {view.name: view for view in views}
        facts = await self._in_time("reading of model files", lambda: _read_all(sources, desired.storage.models_path))
        self._facts = self._facts if facts is None else facts
        await self._read_devices()
        self.measured = await self._in_time("reading of processes' memory", lambda: _measure(pids)) or {}
        self._peaks = {key: _higher(self._peaks.get(key, {}), sizes) for key, sizes in self.measured.items()}
        self.consider(desired)
        return before != (self.candidates, {key: view.total for key, view in self.devices.items()})

    def consider(self, desired: DesiredState) -> None:
        """Work out the candidates of this config from the readings at hand."""
        self.candidates = {
            name: tuple(self._candidate(desired, spec, backend) for backend in spec.backends)
            for name, spec in desired.models.items()
        }

    def snapshot(self, observed: ObservedState) -> ObservedState:
        """Add the readings to what the executor knows of its instances."""
        instances = {
            key: replace(view, measured=self.measured.get(key, {}), peak=self._peaks.get(key, {}))
            for key, view in observed.instances.items()
        }
        return ObservedState(
            instances=instances,
            exits=observed.exits,
            launches=observed.launches,
            devices=self.devices,
            engines=self.engines,
            candidates=self.candidates,
        )

    def _candidate(self, desired: DesiredState, spec: ModelSpec, name: BackendName) -> Candidate:
        engine = desired.engines[name]
        view = self.engines.get(name)
        facts = self._facts.get(spec.source_for(name), ModelFacts())
        backend = self._backends.get(engine.adapter)
        if view is not None and (backend is None or view.problem):
            return Candidate(backend=name, facts=facts, problem=view.problem, hint=view.hint)
        if backend is None or view is None or facts.problem or facts.size is None:
            return Candidate(backend=name, facts=facts, problem=facts.problem, hint=facts.hint)  # without one: not known yet
        return _offer(backend, engine, spec, facts)

    async def _read_devices(self) -> None:
        fresh: dict[DeviceId, DeviceView] = {}
        for reader in self._readers:
            views = await self._in_time(f"reading of {reader.name} devices", reader.read)
            fresh.update({view.id: view for view in views or ()})
        self.devices = fresh

    async def _in_time(self, what: str, read: Callable[[], T]) -> T | None:
        """Call `read` in a thread, under a deadline; None when it fails or is late, and `problems` says so.

        One that hangs keeps its thread, so it is not called again before it has returned.
        """
        if what in self._busy:
            self.problems[what] = "has not returned for longer than its deadline"
            return None
        self._busy.add(what)
        reading = asyncio.ensure_future(asyncio.to_thread(read))
        reading.add_done_callback(lambda done: self._ended(what, done))
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                result = await asyncio.shield(reading)
        except TimeoutError:
            self.problems[what] = f"gave nothing within {READ_TIMEOUT:g} s"
            return None
        except Exception as error:  # noqa: BLE001  (whatever a driver's library raises, its device is unknown now)
            self.problems[what] = f"failed: {error}"
            return None
        self.problems.pop(what, None)
        return result

    def _ended(self, what: str, reading: asyncio.Future[T]) -> None:
        self._busy.discard(what)
        if not reading.cancelled():
            reading.exception()  # asked for, so that a failure after the deadline is not reported as never retrieved


def _read_all(sources: Sequence[str], models_path: Sequence[str]) -> dict[str, ModelFacts]:
    return {source: read_facts(source, models_path) for source in sources}


def _measure(pids: Mapping[InstanceId, int]) -> dict[InstanceId, dict[DeviceId, Bytes]]:
    if not pids:
        return {}
    children = read_children()
    found = {key: own_memory(tree(pid, children)) for key, pid in pids.items()}
    return {key: {HOST_RAM: size} for key, size in found.items() if size is not None}


def _higher(old: Mapping[DeviceId, Bytes], new: Mapping[DeviceId, Bytes]) -> dict[DeviceId, Bytes]:
    return {device: max(size, old.get(device, size)) for device, size in new.items()}


def _offer(backend: Backend, engine: Engine, spec: ModelSpec, facts: ModelFacts) -> Candidate:
    return Candidate(
        backend=engine.name,
        facts=facts,
        fingerprint=fingerprint(backend, engine, spec, facts),
        estimate=backend.estimate(spec, facts),
    )
