"""Joins the readings into one ObservedState. Slow readings are taken in the background; joining them is quick and never waits."""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from offloadd import lasting
from offloadd.backends.base import Backend, backend_of
from offloadd.clock import Clock, SystemClock
from offloadd.observe.devices import DeviceReader
from offloadd.observe.devices.aside import aside
from offloadd.observe.engines import EngineFinder
from offloadd.observe.holdings import Holdings, measure
from offloadd.observe.offers import make_offer
from offloadd.observe.sources import Sources, hub_folders
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import BackendName, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import Candidate, Footprint, ModelFacts, SourceNeed
from offloadd.state.observed import DeviceView, EngineView, InstanceState, ObservedState
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes, Seconds

T = TypeVar("T")

READ_TIMEOUT = Seconds(5)
HOST = "host"
_UNKNOWN = ModelFacts()
_NONE_KNOWN: Mapping[str, ModelFacts] = {}
AT_ONCE_S = 0.004
"""So long one model after another is looked at in one go, before the loop has its turn; there may be very many."""


class Observer:
    """Keeps the latest readings. A reading that fails or is late leaves its device out, which the planner takes as unknown."""

    def __init__(
        self,
        readers: Sequence[DeviceReader],
        backends: Mapping[str, Backend],
        read_shape: Callable[[Path], ModelShape],
        read_content: Callable[[Path], str],
        clock: Clock | None = None,
        known: Callable[[], Mapping[str, ModelFacts]] = lambda: _NONE_KNOWN,
    ) -> None:
        self._clock = clock or SystemClock()
        self._readers = readers
        self._backends = backends
        self._finder = EngineFinder(backends)
        self._sources = Sources(read_shape, read_content)
        self._busy: set[str] = set()
        self._late: dict[str, str] = {}
        self._facts: dict[str, ModelFacts] = {}
        self._known = known
        """Facts by path of files that somebody else keeps an eye on: the same object until one of them is another."""
        self._folders: tuple[str, ...] = ()
        """Where the files were looked for."""
        self._footprints: Mapping[str, Footprint] = {}
        self._offers: dict[tuple[ModelName, BackendName], tuple[object, Candidate]] = {}
        self._considered: tuple[tuple[object, ...], tuple[object, ...]] | None = None
        """What the candidates were worked out from: it is the same while the first are the same objects, and the second equal."""
        self._sources_of: tuple[DesiredState, frozenset[str]] = (DesiredState(), frozenset())
        """The files that a config names: the last one that was asked about."""
        self._turn = asyncio.Lock()
        self._seen_by: dict[str, int] = {}
        self._troubles: dict[str, Mapping[str, str]] = {}
        self.holdings = Holdings()
        self.devices: dict[DeviceId, DeviceView] = {}
        self.engines: dict[BackendName, EngineView] = {}
        self.candidates: dict[ModelName, tuple[Candidate, ...]] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """What could not be read, and why."""
        found = dict(self._late)
        for troubles in self._troubles.values():
            found.update({f"device {name}": why for name, why in troubles.items()})
        found.update({f"device {view.id}": view.problem for view in self.devices.values() if view.problem})
        return found

    @property
    def blind(self) -> str:
        """Why GPUs that are there cannot be seen: a reader of GPUs has trouble, and sees none. Empty when nobody has."""
        for reader in self._readers:
            late = self._late.get(_reading_of(reader), "")
            troubles = self._troubles.get(reader.name, {})
            if reader.name != HOST and not self._seen_by.get(reader.name) and (late or troubles):
                lost = "; ".join(f"{name}: {why}" for name, why in troubles.items())
                return f"{reader.name} devices cannot be read: {late or lost}"
        return ""

    def know(self, footprints: Mapping[str, Footprint]) -> None:
        """Use what earlier launches were seen to take."""
        self._footprints = dict(footprints)  # a copy, since offers remember the one that they were made from

    async def refresh(self, desired: Callable[[], DesiredState], pids: Callable[[], Mapping[Hashable, int]]) -> None:
        """Read everything again for this config and these processes.

        One reading at a time. What to read is asked when its turn comes: a config that has been replaced meanwhile is of no use.
        """
        async with self._turn:
            await self._refresh(desired(), pids())

    async def look_ahead(self, desired: DesiredState, pids: Callable[[], Mapping[Hashable, int]]) -> None:
        """The same for a config that is about to be applied, save that files of which all is well are not looked at again.

        Of a thousand models, a reload mostly touches one.
        """
        async with self._turn:
            same = desired.storage.models_path == self._folders
            known = {source: facts for source, facts in self._facts.items() if same and not facts.problem}
            await self._refresh(desired, pids(), known)

    async def read_memory(self, pids: Callable[[], Mapping[Hashable, int]]) -> None:
        """Read the devices, and what each process tree holds of them."""
        async with self._turn:
            await self._read_memory(pids())

    async def _refresh(
        self, desired: DesiredState, pids: Mapping[Hashable, int], held: Mapping[str, ModelFacts] | None = None
    ) -> None:
        known = self._known()
        sources = sorted(await self._named(desired) - known.keys())
        views = await asyncio.gather(*(self._finder.look(engine) for engine in desired.engines.values()))
        self.engines = {view.name: view for view in views}
        folders = desired.storage.models_path
        hubs = hub_folders(engine.env for engine in desired.engines.values())
        facts: dict[str, ModelFacts] | None = {}
        if sources or self._facts:  # a thread that is asked for nothing is a good part of what an idle daemon costs
            facts = await self._in_time("reading of model files", lambda: self._sources.read(sources, folders, hubs, held))
        if facts is not None:
            self._facts, self._folders = facts, folders
        await self._read_memory(pids)
        await self._consider(desired)

    async def _read_memory(self, pids: Mapping[Hashable, int]) -> None:
        fresh: dict[DeviceId, DeviceView] = {}
        for reader in self._readers:
            views = await self._in_time(_reading_of(reader), reader.read)
            fresh.update({view.id: view for view in views or ()})
            # A processor's own graphics is no card: seeing it does not make up for one that cannot be seen.
            self._seen_by[reader.name] = sum(view.kind is not DeviceKind.HOST and not view.unified for view in views or ())
        if pids or any(view.processes for view in fresh.values()):
            seen = await self._in_time("reading of processes' memory", lambda: measure(pids, fresh))
        else:
            seen = measure({}, fresh)  # no process is looked at
        # In one step: what is free and what of it our own have taken must be of one moment.
        # With the devices, so that nobody sees the one without the other.
        now = self._clock.now()
        self.devices = {device: replace(view, read_at=now) for device, view in fresh.items()}
        self._troubles = {reader.name: dict(reader.problems) for reader in self._readers}
        if seen is not None:
            self.holdings.keep(seen)

    async def consider(self, desired: Callable[[], DesiredState]) -> None:
        """Work out the candidates from the readings at hand, without new ones: other models are wanted, or files have changed."""
        async with self._turn:
            await self._consider(desired())

    async def preview(self, desired: DesiredState) -> Mapping[ModelName, tuple[Candidate, ...]]:
        """The candidates that another config would have. What is known of the present one stays as it is."""
        async with self._turn:
            known = self._known()
            sources = sorted(self._facts.keys() | (await self._named(desired) - known.keys()))
            views = await asyncio.gather(*(self._finder.look(engine) for engine in desired.engines.values()))
            folders = desired.storage.models_path
            hubs = hub_folders(engine.env for engine in desired.engines.values())
            facts = await self._in_time("reading of model files", lambda: self._sources.read(sources, folders, hubs))
            # From here on in one step: nobody sees what is put back at its end.
            present = self.engines, self._facts, self._offers
            self.engines = {view.name: view for view in views}
            self._facts, self._offers = self._facts if facts is None else facts, dict(self._offers)
            try:
                bound = self._bound(desired)
                return {
                    name: tuple(self._candidate(desired, spec, backend, bound[backend]) for backend in spec.backends)
                    for name, spec in desired.models.items()
                }
            finally:
                self.engines, self._facts, self._offers = present

    async def _consider(self, desired: DesiredState) -> None:
        """Work out the candidates of this config, those anew whose basis has changed; the loop goes on meanwhile."""
        considered = (desired, self._known(), self._footprints), (self.engines, self._facts)
        before = self._considered
        if before is not None and all(map(operator.is_, considered[0], before[0])) and considered[1] == before[1]:
            return
        self._offers = {key: offer for key, offer in self._offers.items() if key[0] in desired.models}
        candidates: dict[ModelName, tuple[Candidate, ...]] = {}
        bound = self._bound(desired)
        async for spec in _by_and_by(desired.models.values()):
            candidates[spec.name] = tuple(self._candidate(desired, spec, backend, bound[backend]) for backend in spec.backends)
        self.candidates, self._considered = candidates, considered

    def snapshot(self, observed: ObservedState) -> ObservedState:
        """Add the readings to what the executor knows of its instances."""
        instances = {
            key: replace(
                view,
                measured={} if view.state is InstanceState.EXITED else self.holdings.of(key),
                peak=self.holdings.peak_of(key),
                unreleased=self.holdings.unreleased(view),
            )
            for key, view in observed.instances.items()
        }
        return replace(
            observed,
            instances=instances,
            devices=self.devices,
            engines=self.engines,
            candidates=self.candidates,
            foreign=self.holdings.foreign,
            blind=self.blind,
        )

    def _bound(self, desired: DesiredState) -> Mapping[BackendName, Backend | None]:
        """The adapter of each engine, made once for all the models that name it."""
        return {name: backend_of(self._backends, engine) for name, engine in desired.engines.items()}

    def _candidate(self, desired: DesiredState, spec: ModelSpec, name: BackendName, backend: Backend | None) -> Candidate:
        engine = desired.engines[name]
        view = self.engines.get(name)
        facts = self._facts_of(spec, name, backend)
        if view is not None and (backend is None or view.problem):
            return Candidate(backend=name, facts=facts, problem=view.problem, hint=view.hint)
        if backend is None or view is None or facts.problem or facts.size is None:
            return Candidate(backend=name, facts=facts, problem=facts.problem, hint=facts.hint)  # without one: not known yet
        basis = (backend, engine, view, spec, facts, self._footprints)
        known = self._offers.get((spec.name, name))
        if known is None or known[0] != basis:
            lasting.made()
            known = (basis, make_offer(*basis))
            self._offers[spec.name, name] = known
        return known[1]

    async def _named(self, desired: DesiredState) -> frozenset[str]:
        """Every file that the config names."""
        if self._sources_of[0] is not desired:
            self._sources_of = desired, frozenset([source async for source in self._names(desired)])
        return self._sources_of[1]

    async def _names(self, desired: DesiredState) -> AsyncIterator[str]:
        bound = self._bound(desired)
        async for spec in _by_and_by(desired.models.values()):
            for name in spec.backends:
                backend = bound[name]
                if backend is None or backend.source_need(spec.source_for(name)) is not SourceNeed.NOTHING:
                    yield spec.source_for(name)
                for path in backend.companions(spec) if backend else ():
                    yield path

    def _facts_of(self, spec: ModelSpec, name: BackendName, backend: Backend | None) -> ModelFacts:
        """Facts of the model's own file; the first of its companions that cannot be loaded is a problem of the whole."""
        source = spec.source_for(name)
        if backend is not None and backend.source_need(source) is SourceNeed.NOTHING:
            return ModelFacts(path=source, size=Bytes(0))
        facts = self._fact(source)
        beside = {path: self._fact(path) for path in (backend.companions(spec) if backend else ())}
        broken = next((each for each in beside.values() if each.problem), None)
        if broken and not facts.problem:
            return replace(facts, problem=broken.problem, hint=broken.hint)
        return replace(facts, companions=beside) if beside else facts

    def _fact(self, source: str) -> ModelFacts:
        return self._known().get(source) or self._facts.get(source, _UNKNOWN)

    async def _in_time(self, what: str, read: Callable[[], T]) -> T | None:
        """Call `read` in a thread, under a deadline; None when it fails or is late, and `problems` says so.

        One that hangs keeps its thread, so it is not called again before it has returned.
        """
        if what in self._busy:
            self._late[what] = "has not returned for longer than its deadline"
            return None
        self._busy.add(what)
        reading = asyncio.ensure_future(aside(read, name=what))
        reading.add_done_callback(lambda done: self._ended(what, done))
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                result = await asyncio.shield(reading)
        except TimeoutError:
            self._late[what] = f"gave nothing within {READ_TIMEOUT:g} s"
            return None
        except Exception as error:  # noqa: BLE001  (whatever a driver's library raises, its device is unknown now)
            hint = getattr(error, "hint", "")
            self._late[what] = f"failed: {error}" + (f"; {hint}" if hint else "")
            return None
        self._late.pop(what, None)
        return result

    def _ended(self, what: str, reading: asyncio.Future[T]) -> None:
        self._busy.discard(what)
        if not reading.cancelled():
            reading.exception()  # asked for, so that a failure after the deadline is not reported as never retrieved


async def _by_and_by(models: Iterable[ModelSpec]) -> AsyncIterator[ModelSpec]:
    """Each of them; the loop goes on meanwhile."""
    begun = time.monotonic()
    for spec in models:
        yield spec
        if time.monotonic() - begun > AT_ONCE_S:
            await asyncio.sleep(0)
            begun = time.monotonic()


def _reading_of(reader: DeviceReader) -> str:
    return f"reading of {reader.name} devices"
