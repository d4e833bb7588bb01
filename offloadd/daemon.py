"""The composition root: builds the parts, joins them, and runs them in one TaskGroup until a signal says stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp
from aiohttp import http_parser

from offloadd import __version__, eventloop
from offloadd.api.meters import Meters
from offloadd.api.metrics import OwnCollector, PictureCollector
from offloadd.api.service import Service
from offloadd.backends.base import Backend
from offloadd.beginning import Beginning
from offloadd.catalog import Catalog
from offloadd.chronicle import Chronicle, registry_of
from offloadd.clock import Clock, SystemClock
from offloadd.control import ControlPlane, Sources
from offloadd.effects import Effects
from offloadd.ending import Ending, Estate
from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.forecast import Forecast
from offloadd.hosts import ReadyHosts
from offloadd.journal import journal_in_use
from offloadd.observe.devices import DeviceReader
from offloadd.observe.devices.amdgpu import AmdReader
from offloadd.observe.devices.host import HostReader
from offloadd.observe.devices.nvml import NvmlReader
from offloadd.observe.probes import Prober, open_session
from offloadd.observe.processes import holds_port, open_ports
from offloadd.observe.snapshot import Observer
from offloadd.pictures import Pictures
from offloadd.proxy.keeping import KeepBook
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.registry.content import content_of_model, parts_of
from offloadd.registry.hub.jobs import Pulls
from offloadd.registry.lives import LifeBook
from offloadd.registry.readers import read_model
from offloadd.rounds import Premises, Rounds, keep
from offloadd.runtime.executor import Executor
from offloadd.runtime.forward import Forwarder
from offloadd.runtime.instances import Tools
from offloadd.runtime.launchers.local import LocalLauncher
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.lock import locked
from offloadd.runtime.logs import LogFolder
from offloadd.runtime.reconciler import Reconciler
from offloadd.runtime.reload import ConfigStore
from offloadd.runtime.signals import Signals
from offloadd.runtime.warm import Warmer
from offloadd.runtime.wishes import WishBook
from offloadd.serving import Parts, Serving
from offloadd.state.desired import DesiredState, HealthPolicy, OnStop
from offloadd.state.ids import InstanceId
from offloadd.succession import ready_for_signals, take_place
from offloadd.systemd import Manager
from offloadd.turnover import Turnover

log = logging.getLogger(__name__)


async def serve(
    config: Path,
    backends: Mapping[str, Backend],
    started: Callable[[Daemon], None] = lambda _: None,
    manager: Manager | None = None,
) -> None:
    """Run the daemon for one config path until a signal ends it; PermanentError when the start is not possible.

    `started` is called once it listens. `manager` is the service manager that started us, if one did.
    """
    if not hasattr(http_parser, "HttpRequestParserC"):
        # The pure-Python parser accepts other things than the C one: what is refused must not depend on how it was installed.
        raise PermanentError("aiohttp's C parser is missing", hint="reinstall aiohttp from a wheel")
    clock, manager = SystemClock(), manager or Manager()
    store = ConfigStore(config, backends=backends, clock=clock)
    await store.start()
    data_dir = Path(store.applied.desired.storage.data_dir)
    with locked(data_dir):
        async with open_session() as session:
            daemon = Daemon(store, backends, clock, data_dir, session, manager)
            await daemon.run(started)
    heirlooms = daemon.ending.heirlooms
    if heirlooms is not None:
        take_place(heirlooms, manager.environment(), told_to_end=daemon.ending.told_to_end)


class Daemon:
    """Everything that runs for one config path and one data folder."""

    def __init__(
        self,
        store: ConfigStore,
        backends: Mapping[str, Backend],
        clock: Clock,
        data_dir: Path,
        session: aiohttp.ClientSession,
        manager: Manager,
    ) -> None:
        self._clock = clock
        self._store = store
        self._backends = backends
        self._data_dir = data_dir
        self._manager = manager
        self._probe = Prober(session)
        self._pool = Pool()
        self._hosts = ReadyHosts(lambda: self._executor, self._config, backends)
        readers: list[DeviceReader] = [HostReader(), NvmlReader(), AmdReader()]
        self._observer = Observer(readers, backends, read_model, content_of_model, clock, lambda: self._catalog.facts())
        self._chronicle = Chronicle(registry_of(self._config().storage), clock)
        self._files = asyncio.Event()
        self._catalog = Catalog(self._config, backends, self._chronicle.recorder, self._files.set)
        self._pulls = Pulls(
            folder=lambda: self._config().storage.models_path[0], wall=clock.wall, landed=self._catalog.discovery.look_soon
        )
        self._launcher = LocalLauncher(data_dir)
        self._lives = LifeBook(data_dir / "state.db")
        self._logs = LogFolder(data_dir / "logs")
        self._book = LeaseBook(
            clock=clock,
            hosts=self._hosts.of,
            decision=lambda model: self._reconciler.decision(model),
            wake=self._wake,
            rested=lambda: self._reconciler.wake_later(),
            waits=lambda model, why: self._serving.waits(model, why),
            signal=lambda key: self._signals.of(key),
        )
        self._signals = Signals(
            clock=clock, probe=self._probe, choices=self._hosts.choices, held=lambda: self._book.demand().leases
        )
        self._keeping = KeepBook()
        self._wishes = WishBook(clock=clock, wake=self._wake, newest=lambda model: self._executor.newest(model))
        self._loans = LoanBook(clock=clock, wake=self._wake, measured=self._observer.holdings.of)
        self._warmer = Warmer(parts_of)
        self._executor = Executor(backends, lambda name: self._config().engines[name], self._tools(), self._loans.grant)
        self._pictures = self._join_pictures()
        self._meters = Meters()
        self._reconciler = Reconciler(
            clock=clock,
            desired=self._pictures.desired,
            observed=self._pictures.observed,
            demand=self._pictures.demand,
            apply=lambda plan: self._effects.apply(plan),
            woke_up=self._executor.sign_all,
            took=self._meters.cycled,
        )
        self._rounds = Rounds(self._premises())
        self._control = ControlPlane(clock, self._meters, self._sources())
        self._service = Service(manager, self._control.look)
        self._effects = self._join_effects()
        self._turnover = self._join_turnover()
        self._serving = Serving(clock, self._parts())
        self._meters.registry.register(PictureCollector(lambda: self._control.look(closely=True)))
        self._meters.registry.register(OwnCollector(self._serving.held))
        self.ending = Ending(clock, self._estate())

    async def run(self, started: Callable[[Daemon], None]) -> None:
        """Serve until told to stop, which may be while it starts."""
        for number in (signal.SIGTERM, signal.SIGINT):
            eventloop.on_signal(number, self.stop)
        ready_for_signals()
        await self._beginning().run()
        turnover = self._turnover
        self._store.follow(before=turnover.before_config, after=turnover.after_config, around=self._service.reloading)
        async with self._serving.open(), asyncio.TaskGroup() as group:
            loops = (
                self._reconciler.run(),
                keep("a look at the machine", self._rounds.look_again),
                keep("the trimming of logs", self._rounds.trim_logs),
                keep("the watch of the config", self._store.watch),
                keep("the word to the service manager", self._service.attend),
                keep("the asking of engines for their load", self._rounds.ask_engines),
                keep("the writing of the registry", self._chronicle.attend),
                keep("the search for models", self._catalog.discovery.attend),
                keep("the watch of models' folders", self._catalog.discovery.watch),
                keep("serving what was found", turnover.follow_files),
                self._serving.patience.run(),
            )
            tasks = [group.create_task(loop) for loop in loops]
            eventloop.on_signal(signal.SIGHUP, lambda: group.create_task(self._store.reload("SIGHUP")))
            log.info("offloadd %s started, on %s", __version__, eventloop.NAME, extra=about(EventKind.DAEMON_STARTED))
            eventloop.settle()
            started(self)
            self._service.ready()
            eventloop.on_signal(signal.SIGUSR2, lambda: group.create_task(self.ending.replace()))
            await self.ending.run()
            for task in tasks:
                task.cancel()
        self._warmer.stop()
        await self._pulls.close()
        await self._chronicle.close()
        await asyncio.to_thread(self._lives.close)
        self._launcher.close()

    def stop(self) -> None:
        """Begin to end: as SIGTERM does. Called again, it stops waiting for requests."""
        self.ending.begin()

    def _config(self) -> DesiredState:
        """As it is in force."""
        return self._store.applied.desired

    def _health(self, instance: InstanceId) -> HealthPolicy:
        spec = self._config().models.get(instance.model)
        return spec.health if spec else HealthPolicy()

    def _keeps(self) -> bool:
        """Whether the servers outlive us."""
        return self._config().server.on_stop is OnStop.KEEP

    def _wake(self) -> None:
        self._reconciler.wake()

    def _tools(self) -> Tools:
        return Tools(
            clock=self._clock,
            launcher=self._launcher,
            logs=self._logs,
            lives=self._lives,
            boot=self._launcher.boot,
            probe=self._probe,
            holds_port=holds_port,
            open_ports=open_ports,
            changed=lambda instance: self._effects.changed(instance),
            held=lambda key: self._book.demand().leases.get(key, 0),
            health=self._health,
            hang_up=lambda instance, why, died: self._effects.hang_up(instance, why, died),
        )

    def _join_pictures(self) -> Pictures:
        return Pictures(
            catalog=self._catalog,
            keeping=self._keeping,
            executor=self._executor,
            observer=self._observer,
            book=self._book,
            loans=self._loans,
            wishes=self._wishes,
            closing=lambda: self.ending.closing and not self._keeps(),
        )

    def _premises(self) -> Premises:
        return Premises(
            observer=self._observer,
            catalog=self._catalog,
            executor=self._executor,
            loans=self._loans,
            chronicle=self._chronicle,
            signals=self._signals,
            forwarder=Forwarder(self._logs, journal_in_use),
            logs=self._logs,
            lives=self._lives,
            observed=self._pictures.observed,
            latest=lambda: self._reconciler.latest,
            wake=self._wake,
        )

    def _sources(self) -> Sources:
        return Sources(
            store=self._store,
            pictures=self._pictures,
            reconciler=self._reconciler,
            catalog=self._catalog,
            observer=self._observer,
            chronicle=self._chronicle,
            lives=self._lives,
            signals=self._signals,
        )

    def _join_effects(self) -> Effects:
        return Effects(
            executor=self._executor,
            hosts=self._hosts,
            book=self._book,
            pool=self._pool,
            rounds=self._rounds,
            loans=self._loans,
            warmer=self._warmer,
            wishes=self._wishes,
            service=self._service,
            observer=self._observer,
            chronicle=self._chronicle,
            wake=self._wake,
        )

    def _join_turnover(self) -> Turnover:
        return Turnover(
            catalog=self._catalog,
            observer=self._observer,
            rounds=self._rounds,
            hosts=self._hosts,
            executor=self._executor,
            book=self._book,
            wishes=self._wishes,
            config=self._config,
            other_files=self._files,
            listeners=lambda: self._serving.listeners,
            wake=self._wake,
        )

    def _parts(self) -> Parts:
        forecast = Forecast(
            clock=self._clock, backends=self._backends, catalog=self._catalog, observer=self._observer, pictures=self._pictures
        )
        return Parts(
            control=self._control,
            book=self._book,
            keeping=self._keeping,
            pool=self._pool,
            hosts=self._hosts,
            executor=self._executor,
            loans=self._loans,
            wishes=self._wishes,
            logs=self._logs,
            pulls=self._pulls,
            recorder=self._chronicle.recorder,
            reconciler=self._reconciler,
            manager=self._manager,
            server=lambda: self._config().server,
            desired=lambda: self._catalog.desired,
            preview=forecast.of,
            wake=self._wake,
        )

    def _beginning(self) -> Beginning:
        return Beginning(
            backends=self._backends,
            config=self._config,
            lives=self._lives,
            launcher=self._launcher,
            executor=self._executor,
            chronicle=self._chronicle,
            catalog=self._catalog,
            observer=self._observer,
            rounds=self._rounds,
        )

    def _estate(self) -> Estate:
        return Estate(
            config=self._store.path,
            data_dir=self._data_dir,
            book=self._book,
            executor=self._executor,
            lives=self._lives,
            service=self._service,
            listeners=lambda: self._serving.listeners,
            keeps=self._keeps,
            wake=self._wake,
        )
