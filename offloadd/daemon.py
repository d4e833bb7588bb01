"""The composition root: builds the parts, joins them, and runs them in one TaskGroup until a signal says stop."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
from aiohttp import http_parser

from offloadd import __version__, eventloop
from offloadd.api.app import Door, answer_headers, as_seen, build_app, new_id, present_request, request_id
from offloadd.api.borrow import borrow_route
from offloadd.api.byhand import by_hand_routes
from offloadd.api.caller import caller
from offloadd.api.explain import explain_routes
from offloadd.api.express import Lane
from offloadd.api.front import Runner
from offloadd.api.limits import Bodies, KeyMeter
from offloadd.api.listen import Listeners, allowed_hosts, open_listeners
from offloadd.api.logs import logs_route
from offloadd.api.meters import Meters
from offloadd.api.metrics import OwnCollector, PictureCollector
from offloadd.api.ollama_pull import ollama_pull_route
from offloadd.api.patience import IDLE, Patience
from offloadd.api.picture import ConfigStatus, Picture, Problem
from offloadd.api.preview import Change, plan_route
from offloadd.api.problems import Problems, changed_at_start, of_listeners, of_memory, of_models, of_processes, of_sleep
from offloadd.api.pulls import pull_routes
from offloadd.api.recent import Recent
from offloadd.api.service import Service
from offloadd.backends.base import Backend
from offloadd.catalog import Catalog
from offloadd.chronicle import Chronicle, registry_of
from offloadd.clock import Clock, SystemClock
from offloadd.config import Loaded, SourceText, SystemSecrets, load, render_json
from offloadd.ending import Ending, Estate
from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.hosts import ReadyHosts
from offloadd.journal import journal_in_use
from offloadd.observe.devices import DeviceReader
from offloadd.observe.devices.amdgpu import AmdReader
from offloadd.observe.devices.host import HostReader
from offloadd.observe.devices.nvml import NvmlReader
from offloadd.observe.probes import Prober, open_session
from offloadd.observe.processes import holds_port, open_ports
from offloadd.observe.snapshot import Observer
from offloadd.plan.foresee import foresee
from offloadd.plan.placement import Site
from offloadd.proxy.account import Accounts
from offloadd.proxy.again import with_another_try
from offloadd.proxy.dialects.refusals import shaped
from offloadd.proxy.endpoints import dialect_routes
from offloadd.proxy.express import Express
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.keeping import KeepBook
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.registry.content import content_of_model, parts_of
from offloadd.registry.hub.jobs import Pulls
from offloadd.registry.lives import LifeBook
from offloadd.registry.readers import read_model
from offloadd.runtime.executor import Executor
from offloadd.runtime.forward import Forwarder
from offloadd.runtime.instance import Tools
from offloadd.runtime.launchers.local import LocalLauncher
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.lock import locked
from offloadd.runtime.logs import LogFolder, printable
from offloadd.runtime.orphans import take_up
from offloadd.runtime.reconciler import Reconciler
from offloadd.runtime.reload import ConfigStore, explain
from offloadd.runtime.signals import Signals
from offloadd.runtime.warm import Warmer
from offloadd.runtime.wishes import WishBook
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, Engine, HealthPolicy, OnStop
from offloadd.state.history import History
from offloadd.state.ids import InstanceId, ModelName
from offloadd.state.life import Life
from offloadd.state.observed import LEAVING, InstanceState, ObservedState
from offloadd.state.served import Served
from offloadd.succession import ready_for_signals, take_place
from offloadd.systemd import Manager
from offloadd.units import Seconds

log = logging.getLogger(__name__)

RELEASE_POLL = Seconds(0.1)
"""How often devices are read while memory of an ended instance is on its way back."""
REFRESH = Seconds(2)
"""How often devices, engines and model files are looked at again."""
QUIET_REFRESH = Seconds(9.5)
"""The same while nothing runs and nobody waits; what is to be given is read again before it is given.

A little more often than the reconcile loop cycles by itself, which then has no need to.
"""
TRIM = Seconds(1)
"""How often instances' logs are checked against their bound."""
STALLED = Seconds(30)
"""A reconcile loop that completed no cycle for so long makes no progress: /health answers 503."""


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
    clock = SystemClock()
    store = ConfigStore(config, backends=backends, clock=clock)
    await store.start()
    data_dir = Path(store.applied.desired.storage.data_dir)
    with locked(data_dir):
        async with open_session() as session:
            daemon = Daemon(store, backends, clock, data_dir, session, manager or Manager())
            await daemon.run(started)
    heirlooms = daemon.ending.heirlooms
    if heirlooms is not None:
        take_place(heirlooms, daemon.environment(), told_to_end=daemon.ending.told_to_end)


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
        self._session = session
        self._pool = Pool()
        self._ready_hosts = ReadyHosts(lambda: self._executor, lambda: store.applied.desired, backends)
        self._host_names: tuple[object, frozenset[str]] = (None, frozenset())
        self._manager = manager
        self._service = Service(manager, self.look)
        self._listeners = Listeners((), activated=False)
        self._started_wall = clock.wall()
        self._problems = Problems()
        self._recent = Recent(clock.wall)
        self._meter = KeyMeter(clock)
        self._bodies = Bodies()
        self._patience = Patience(clock, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.meters = Meters()
        self.meters.registry.register(PictureCollector(lambda: self.look(closely=True)))
        self.meters.registry.register(OwnCollector(self._held))
        self._asked: asyncio.Task[Picture] | None = None
        readers: list[DeviceReader] = [HostReader(), NvmlReader(), AmdReader()]
        self._observer = Observer(readers, backends, read_model, content_of_model, clock, lambda: self._catalog.facts())
        self._chronicle = Chronicle(registry_of(store.applied.desired.storage), clock)
        self._files = asyncio.Event()
        self._catalog = Catalog(lambda: store.applied.desired, backends, self._chronicle.recorder, self._files.set)
        self._pulls = Pulls(
            folder=lambda: store.applied.desired.storage.models_path[0], wall=clock.wall, landed=self._catalog.discovery.look_soon
        )
        self._tended = True
        """Whether logs of instances may have to be seen to once more."""
        self._stirred = asyncio.Event()
        """Set when an instance begins or changes: who looks after instances sleeps while there are none."""
        self._look_soon = asyncio.Event()
        self._read_now = asyncio.Event()
        self._begun = store.applied.desired
        self._data_dir = data_dir
        self._launcher = LocalLauncher(data_dir)
        self._lives = LifeBook(data_dir / "state.db")
        self._logs = LogFolder(data_dir / "logs")
        self._forwarder = Forwarder(self._logs, journal_in_use)
        self._book = LeaseBook(
            clock=clock,
            hosts=self._ready_hosts.of,
            decision=self._decision,
            wake=self._wake,
            waits=self._waits,
            signal=lambda key: self._signals.of(key),
        )
        self._signals = Signals(
            clock=clock, probe=Prober(session), choices=self._ready_hosts.choices, held=lambda: self._book.demand().leases
        )
        self._keeping = KeepBook()
        self._wishes = WishBook(clock=clock, wake=self._wake, newest=lambda model: self._executor.newest(model))
        self._loans = LoanBook(clock=clock, wake=self._wake, measured=self._observer.holdings.of)
        self._warmer = Warmer(parts_of)
        self._executor = Executor(backends, lambda name: store.applied.desired.engines[name], self._tools(), self._loans.grant)
        self.ending = Ending(
            clock,
            Estate(
                config=store.path,
                data_dir=data_dir,
                book=self._book,
                executor=self._executor,
                lives=self._lives,
                service=self._service,
                listeners=lambda: self._listeners,
                keeps=lambda: self._keeps,
                wake=self._wake,
            ),
        )
        self._reconciler = Reconciler(
            clock=clock,
            desired=self._desired,
            observed=self._observed,
            demand=self._demand,
            apply=self._apply,
            woke_up=self._executor.sign_all,
            took=self.meters.cycled,
        )

    async def run(self, started: Callable[[Daemon], None]) -> None:
        """Serve until told to stop, which may be while it starts."""
        for number in (signal.SIGTERM, signal.SIGINT):
            eventloop.on_signal(number, self.stop)
        ready_for_signals()
        adopted = await self._take_over()
        shelf = await self._chronicle.start()
        self._catalog.begin(shelf)
        self._observer.know(self._chronicle.recorder.footprints)
        if not (adopted and shelf.present):
            # Servers of models that are nowhere to be found would be stopped: it is looked first, or remembered.
            await self._catalog.discovery.first()
            self._catalog.publish()
        if adopted:
            # They could serve already: what else there is can be looked at meanwhile, and is unknown to the planner until then.
            self._look_soon.set()
        else:
            await self._look_ahead(self._store.applied.desired)
        self._store.follow(before=self._before_config, after=self._follow_config, around=self._service.reloading)
        async with self._serving(), asyncio.TaskGroup() as group:
            loops = (
                self._reconciler.run(),
                self._keep("a look at the machine", self._look_again),
                self._keep("the trimming of logs", self._trim_logs),
                self._keep("the watch of the config", self._store.watch),
                self._keep("the word to the service manager", self._service.attend),
                self._keep("the asking of engines for their load", self._ask_engines),
                self._keep("the writing of the registry", self._chronicle.attend),
                self._keep("the search for models", self._catalog.discovery.attend),
                self._keep("the watch of models' folders", self._catalog.discovery.watch),
                self._keep("serving what was found", self._follow_files),
                self._patience.run(),
            )
            tasks = [group.create_task(loop) for loop in loops]
            eventloop.on_signal(signal.SIGHUP, lambda: group.create_task(self._reload_by_signal()))
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

    def look(self, *, closely: bool = False) -> Picture:
        """One reading of everything; `closely` by somebody who wants engines to be asked how busy they are from now on."""
        if closely:
            self._signals.look()
        attempt, applied = self._store.attempt, self._store.applied
        now, wall = self._clock.now(), self._clock.wall()
        config = ConfigStatus(
            generation=applied.desired.generation,
            applied_wall=applied.wall,
            attempt_wall=attempt.wall,
            attempt_ok=attempt.applied,
            message="" if attempt.applied else explain(attempt),
            diagnostics=render_json(attempt.diagnostics),
            shown=applied.shown,
        )
        return Picture(
            now=now,
            wall=wall,
            started_wall=self._started_wall,
            desired=self._desired(),
            observed=self._observed(),
            demand=self._demand(),
            plan=self._reconciler.latest,
            config=config,
            problems=self._list_problems(wall),
            alive=now - self._reconciler.completed_at < STALLED,
            shelf=self._catalog.shelf,
            totals=self._chronicle.recorder.totals,
            signals=self._signals.told(),
        )

    async def history(self, model: ModelName) -> History:
        """What one model did, as the registry remembers it."""
        return await self._chronicle.history(model)

    async def reload(self) -> Picture:
        """Read the config again and apply it if it is good."""
        await self._store.reload("POST /reload")
        return self.look()

    def reload_soon(self) -> None:
        """The same, not waited for; its outcome is in the log and in the next picture."""
        self._asked = asyncio.create_task(self.reload())

    def _tools(self) -> Tools:
        return Tools(
            clock=self._clock,
            launcher=self._launcher,
            logs=self._logs,
            lives=self._lives,
            boot=self._launcher.boot,
            probe=Prober(self._session),
            holds_port=holds_port,
            open_ports=open_ports,
            changed=self._changed,
            held=lambda key: self._book.demand().leases.get(key, 0),
            health=self._health,
            hang_up=self._hang_up,
        )

    async def _take_over(self) -> int:
        """Processes of an earlier daemon that was killed: what we can vouch for serves on, and all else must not keep memory.

        How many there are.
        """
        desired = self._store.applied.desired
        orphans = await take_up(
            self._lives.lives(),
            lives=self._lives,
            launcher=self._launcher,
            holds_port=lambda life, pid: bool(life.stop_command) or holds_port(pid, life.endpoint.port),
            startable=lambda life: life.backend in desired.engines and desired.engines[life.backend].adapter in self._backends,
            boot=self._launcher.boot,
            engine_of=lambda life: desired.engines.get(life.backend) or _former_engine(life),
        )
        self._executor.remember(self._lives.exits(self._launcher.boot))
        self._executor.take_over(orphans, desired.models)
        return len(orphans)

    def _health(self, instance: InstanceId) -> HealthPolicy:
        spec = self._store.applied.desired.models.get(instance.model)
        return spec.health if spec else HealthPolicy()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        accounts = Accounts(self._clock, self._served, lambda: caller().name)
        door = Door(
            access=lambda: self._store.applied.desired.server.access,
            allowed_hosts=self._allowed_hosts,
            meter=self._meter,
            patience=self._patience,
            max_body=self._store.applied.desired.server.max_body,
            bodies=self._bodies,
        )
        gateway = Gateway(
            book=self._book,
            desired=lambda: self._catalog.desired,
            pool=self._pool,
            request_id=request_id,
            bears=lambda request: answer_headers(request, door),
            accounts=accounts,
            api_of=self._ready_hosts.api,
            may_use=lambda spec: caller().may_use(spec.name, spec.aliases),
        )
        server = self._store.applied.desired.server
        borrow = borrow_route(self._loans, lambda name: self._reconciler.latest.loans.get(name, "waits to be looked at"))
        dialects = dialect_routes(
            gateway, accounts=accounts, api_of=self._ready_hosts.api, look=lambda: as_seen(self.look()), keep=self._keep_loaded
        )
        logs = logs_route(self._logs, self._runs, gateway.find, printable)
        by_hand = by_hand_routes(self._wishes, gateway.find, self._decision)
        routes = [*with_another_try([*gateway.routes(), *dialects], gateway.engines), borrow, logs, *by_hand]
        routes.append(plan_route(self._preview))
        routes += [*pull_routes(self._pulls), ollama_pull_route(self._pulls)]
        routes += explain_routes(self._recent, lambda: as_seen(self.look()), gateway.find)
        app = build_app(self, routes, gateway.find, door, accounts.close, shaped, gateway.tell_begun)
        # A client that leaves must end its handler: aiohttp leaves that off by default.
        options = {"handler_cancellation": True, "access_log": None, "shutdown_timeout": 1.0, "keepalive_timeout": IDLE}
        express = Express(lambda: gateway.names, self._book, self._pool, accounts, new_id)
        lane = Lane(door.access, door.allowed_hosts, express.take)
        runner = Runner(app, self._patience, door.max_body, lane, **options)
        await runner.setup()
        logging.getLogger("offloadd").addHandler(self.meters.handler)
        logging.getLogger("offloadd").addHandler(self._recent)
        try:
            self._listeners = await open_listeners(server.listen, self._manager)
            self._listeners.check(server)
            self._manager.discard_rest()
            await self._listeners.serve(runner)
            yield
        finally:
            logging.getLogger("offloadd").removeHandler(self._recent)
            logging.getLogger("offloadd").removeHandler(self.meters.handler)
            await runner.cleanup()
            accounts.flush()
            self._listeners.close()
            await gateway.close()
            self._pool.close()

    def _hang_up(self, instance: InstanceId, why: str, died: bool) -> None:
        """End the instance's requests, and every connection that is kept for the next: some servers wait for their clients."""
        self._book.hang_up(instance, why, died=died)
        ending = self._executor.get(instance)
        endpoint = ending.view().endpoint if ending is not None else None
        if endpoint is not None:
            self._pool.forget(endpoint)

    def _held(self) -> dict[str, float]:
        """What is held for clients now, by the names of `OWN`."""
        return {
            "client_connections": self._patience.size,
            "engine_connections": self._pool.size,
            "request_leases": len(self._book.running()),
            "body_bytes": self._bodies.held,
        }

    def _served(self, served: Served) -> None:
        """One inference request is over. Whoever counts, keeps or explains them is told here."""
        self.meters.served(served)
        self._recent.served(served)
        self._meter.spend(caller(), (served.prompt_tokens or 0) + (served.completion_tokens or 0))
        self._chronicle.recorder.served(served)

    def _waits(self, model: ModelName, why: str) -> None:
        """A request was put into a queue."""
        self._recent.waits(model, present_request(), why)

    async def _preview(self, sources: Sequence[SourceText]) -> tuple[Loaded, Change | None]:
        """What this config would change, from how things are now; None when it is not good."""
        loaded = await asyncio.to_thread(load, sources, backends=self._backends, secrets=SystemSecrets())
        if loaded.desired is None:
            return loaded, None
        await self._catalog.prepare(loaded.desired)
        new = self._catalog.served_by(loaded.desired)
        candidates = await self._observer.preview(new)
        old, observed, demand, now = self._desired(), self._observed(), self._demand(), self._clock.now()
        site = Site(devices=observed.devices, accounts={})

        def follow() -> Change:
            applied = replace(demand, wishes={})  # which yield to a config that is applied
            return Change(
                old=old,
                new=replace(new, generation=old.generation),
                without=foresee(old, observed, demand, now=now),
                within=foresee(new, replace(observed, candidates=candidates), applied, now=now),
                labels={device: site.label(device) for device in observed.devices},
            )

        return loaded, await asyncio.to_thread(follow)

    def _runs(self, instance: InstanceId) -> bool:
        return instance in self._executor.alive()

    def _allowed_hosts(self) -> frozenset[str]:
        """The names given by the present config, and those of the addresses that are really listened on."""
        server = self._store.applied.desired.server
        if self._host_names[0] is not server:
            self._host_names = (server, allowed_hosts(self._listeners.addresses, server.allowed_hosts))
        return self._host_names[1]

    async def _reload_by_signal(self) -> None:
        await self._store.reload("SIGHUP")

    def environment(self) -> dict[str, str]:
        """What a program that takes our place needs to know of our service manager."""
        return self._manager.environment()

    @property
    def _keeps(self) -> bool:
        """Whether the servers outlive us."""
        return self._store.applied.desired.server.on_stop is OnStop.KEEP

    async def _keep(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take the step for ever. One that fails is logged, and the next is taken: no loop may take the servers down with it."""
        while True:
            try:
                await step()
            except Exception:
                log.exception("%s failed", what, extra=about(EventKind.INTERNAL_ERROR))
                await asyncio.sleep(REFRESH)

    async def _look_again(self) -> None:
        """Look again after a while, or soon after an instance has ended, until its memory is seen to be free."""
        views = self._observed().instances.values()
        soon = any(view.unreleased or view.state is InstanceState.FALLING_ASLEEP for view in views)
        with suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_POLL if soon else QUIET_REFRESH if self._quiet() else REFRESH):
                await self._look_soon.wait()
        self._look_soon.clear()
        loaded = self._ready()
        if soon or self._read_now.is_set():
            self._read_now.clear()
            await self._observer.read_memory(self._pids)
        else:
            await self._observer.refresh(lambda: self._catalog.specs, self._pids)
        self._observer.holdings.forget({*self._executor.views(), *self._loans.loans()})
        self._wake()
        self._learn(loaded & self._ready())

    def _quiet(self) -> bool:
        """Whether nothing runs, nobody waits, and no model is wanted that cannot be had: then nobody needs a new reading."""
        waits = any(decision.state is not ModelState.OFF for decision in self._reconciler.latest.decisions.values())
        return not waits and not self._executor.views() and not self._loans.loans()

    def _ready(self) -> set[InstanceId]:
        return {key for key, view in self._executor.views().items() if view.state is InstanceState.READY}

    def _learn(self, loaded: Container[InstanceId]) -> None:
        """Keep what instances that were `loaded` all through a reading were seen to take, for the next launch of the same kind."""
        news = self._chronicle.learn(view for key, view in self._observed().instances.items() if key in loaded)
        moved = self._chronicle.rename(offer for offers in self._observer.candidates.values() for offer in offers)
        if news or moved:
            self._observer.know(self._chronicle.recorder.footprints)

    async def _stir(self) -> None:
        """Wait until there may be instances, where there are none; not for ever, since other things may need an eye too."""
        self._stirred.clear()
        if not self._executor.views():
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_REFRESH):
                    await self._stirred.wait()

    async def _ask_engines(self) -> None:
        await self._stir()
        await self._signals.attend()

    async def _trim_logs(self) -> None:
        if not self._tended and not self._lives.problem:
            await self._stir()
        await asyncio.sleep(TRIM)
        views = dict(self._executor.views())
        if not views and not self._tended and not self._lives.problem:
            return  # nobody writes, and a change of threads for nothing is a good part of what an idle daemon costs
        self._tended = bool(views)

        def tend() -> None:
            self._forwarder.forward(views)
            self._logs.trim(list(views))
            self._lives.retry()

        await asyncio.to_thread(tend)  # in one step: each costs an idle daemon as much as what it does

    async def _look_ahead(self, desired: DesiredState) -> None:
        """Read the files and engines that a new config names, so that the first plan for it knows them."""
        await self._catalog.prepare(desired)
        await self._observer.look_ahead(self._catalog.with_config(desired), self._pids)

    async def _follow_files(self) -> None:
        """Serve what was found on disk, once it is known what it needs, and no longer what is gone."""
        await self._files.wait()
        self._files.clear()
        await self._catalog.prepare(self._store.applied.desired)
        await self._observer.consider(lambda: self._catalog.specs)
        self._catalog.publish()
        self._forget_models()

    async def _before_config(self, desired: DesiredState) -> None:
        """PermanentError when a config that is good by itself is not for the sockets that systemd gave us."""
        self._listeners.check(desired.server)
        await self._look_ahead(desired)

    def _follow_config(self) -> None:
        self._catalog.reloaded()
        self._look_soon.set()  # at files that were there before, and may be others by now
        self._wishes.yield_to_config(self._catalog.desired.models)
        self._forget_models()

    def _forget_models(self) -> None:
        """Drop what is kept of models that are neither in the config nor on disk any more."""
        self._ready_hosts.changed()
        models = self._catalog.desired.models
        self._executor.forget_models(models)
        self._book.forget_models(models.get)
        self._wake()

    def _desired(self) -> DesiredState:
        applied = self._catalog.desired
        if self.ending.closing and not self._keeps:
            return replace(applied, models={}, closing=True)
        return self._keeping.applied_to(applied, self._executor.views())

    def _observed(self) -> ObservedState:
        return self._observer.snapshot(self._executor.observed())

    def _demand(self) -> Demand:
        return self._wishes.join(replace(self._book.demand(), loans=self._loans.loans()))

    def _pids(self) -> dict[Hashable, int]:
        """Leaders of all process trees whose memory is measured."""
        pids: list[tuple[Hashable, int]] = [*self._executor.pids().items(), *self._loans.pids().items()]
        return dict(pids)

    def _apply(self, plan: Plan) -> None:
        self._executor.apply(plan)
        if plan.actions:
            self._ready_hosts.changed()
            self._stirred.set()
        self._loans.refuse(plan)
        self._warmer.follow(plan.warm)
        self._service.changed()
        # Before the next request can come in: those that wait see the decisions and instances of this plan.
        self._book.serve_all()
        self._wishes.told(plan, self._executor.observed())
        if plan.read_now:
            self._read_now.set()
            self._look_soon.set()

    def _changed(self, instance: InstanceId) -> None:
        self._ready_hosts.changed()
        self._stirred.set()
        self._book.serve_all()
        self._note(instance)
        ended = self._executor.get(instance)
        if ended is None:
            self._book.forget(instance)
        if ended is not None and ended.view().placement.gpus:
            self._look_soon.set()
        self._wake()

    def _note(self, key: InstanceId) -> None:
        """Tell the registry's history what an instance has come to."""
        instance = self._executor.get(key)
        if instance is not None:
            view = replace(instance.view(), peak=self._observer.holdings.peak_of(key))
            ends = self._executor.observed().exits.get(key.model, ())[-1:]
            self._chronicle.note(view, instance.source_size, ends if view.state is InstanceState.EXITED else ())

    def _wake(self) -> None:
        self._reconciler.wake()

    def _keep_loaded(self, model: ModelName, stay: Seconds) -> None:
        """A client's wish for how long the model's present instances stay after its last request."""
        live = [key for key, view in self._executor.views().items() if key.model == model and view.state not in LEAVING]
        self._keeping.wish(model, stay, live)
        self._wake()

    def _decision(self, model: ModelName) -> Decision | None:
        return self._reconciler.latest.decisions.get(model)

    def _list_problems(self, wall: float) -> list[Problem]:
        found = {f"{what} {why}": "" for what, why in self._observer.problems.items()}
        found.update(self._chronicle.problems)
        if self._lives.problem:
            found[self._lives.problem] = "see that the disk has room and that the data folder is writable"
        found.update(self._catalog.problems)
        if self._store.blind:
            found[f"changes of the config bring no event: {self._store.blind}"] = (
                "it is looked at every 2 s all the same; raise fs.inotify.max_user_instances or max_user_watches"
            )
        if self._reconciler.problem:
            found[f"the last reconcile cycle failed: {self._reconciler.problem}"] = "this is a bug: see the log"
        for name in changed_at_start(self._begun, self._store.applied.desired):
            found[f"{name} was changed in the config and is still what it was at the start"] = "restart the daemon to change it"
        if not self._store.attempt.applied:
            found["the last config was refused; the one before it is in force"] = "run offloadd check on it, correct it and reload"
        found.update(of_models(self._reconciler.latest))
        found.update(of_memory(self._observed()))
        found.update(of_listeners(self._observed()))
        found.update(of_processes(self._observed()))
        found.update(of_sleep(self._observed(), self._demand()))
        return self._problems.list(found, wall)


def _former_engine(life: Life) -> Engine:
    """One that the config does not have any more, as far as ending its servers goes."""
    return Engine(name=life.backend, adapter="", user=life.user, group=life.group)
