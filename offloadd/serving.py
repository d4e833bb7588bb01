"""Serves the API: joins the data plane's routes with the control plane's to one app, and listens until told to end."""

from __future__ import annotations

import logging
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

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
from offloadd.api.ollama_pull import ollama_pull_route
from offloadd.api.patience import IDLE, Patience
from offloadd.api.picture import Control, Picture
from offloadd.api.preview import Change, plan_route
from offloadd.api.pulls import pull_routes
from offloadd.api.recent import Recent
from offloadd.clock import Clock
from offloadd.config import Loaded, SourceText
from offloadd.hosts import ReadyHosts
from offloadd.proxy.account import Accounts
from offloadd.proxy.again import with_another_try
from offloadd.proxy.dialects.refusals import shaped
from offloadd.proxy.endpoints import dialect_routes
from offloadd.proxy.express import Express
from offloadd.proxy.gateway import Gateway
from offloadd.proxy.keeping import KeepBook
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.registry.hub.jobs import Pulls
from offloadd.registry.recorder import Recorder
from offloadd.runtime.executor import Executor
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.logs import LogFolder, printable
from offloadd.runtime.reconciler import Reconciler
from offloadd.runtime.wishes import WishBook
from offloadd.state.desired import DesiredState, ServerSpec
from offloadd.state.ids import InstanceId, ModelName
from offloadd.state.observed import LEAVING
from offloadd.state.served import Served
from offloadd.systemd import Manager
from offloadd.units import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What requests are answered from, and who is told of them."""

    control: Control
    book: LeaseBook
    keeping: KeepBook
    pool: Pool
    hosts: ReadyHosts
    executor: Executor
    loans: LoanBook
    wishes: WishBook
    logs: LogFolder
    pulls: Pulls
    recorder: Recorder
    reconciler: Reconciler
    manager: Manager
    server: Callable[[], ServerSpec]
    """The present config's."""
    desired: Callable[[], DesiredState]
    """What can be asked for."""
    preview: Callable[[Sequence[SourceText]], Awaitable[tuple[Loaded, Change | None]]]
    wake: Callable[[], None]


class Serving:
    """Where requests come in, and all that is kept of clients."""

    def __init__(self, clock: Clock, parts: Parts) -> None:
        self._clock = clock
        self._parts = parts
        self._recent = Recent(clock.wall)
        self._meter = KeyMeter(clock)
        self._bodies = Bodies()
        self._host_names: tuple[object, frozenset[str]] = (None, frozenset())
        self.patience = Patience(clock, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.listeners = Listeners((), activated=False)
        """None before it is open."""

    def waits(self, model: ModelName, why: str) -> None:
        """A request was put into a queue."""
        self._recent.waits(model, present_request(), why)

    def held(self) -> dict[str, float]:
        """What is held for clients now, by the names of `api.metrics.OWN`."""
        return {
            "client_connections": self.patience.size,
            "engine_connections": self._parts.pool.size,
            "request_leases": len(self._parts.book.running()),
            "body_bytes": self._bodies.held,
        }

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listen and serve; at the end, let go of every client and every connection to an engine."""
        parts, server = self._parts, self._parts.server()
        accounts = Accounts(self._clock, self._served, lambda: caller().name)
        door = self._door(server, accounts)
        gateway = self._gateway(accounts, door)
        app = build_app(
            parts.control, self._routes(gateway, accounts), gateway.find, door, accounts.close, shaped, gateway.tell_begun
        )
        # A client that leaves must end its handler: aiohttp leaves that off by default.
        options = {"handler_cancellation": True, "access_log": None, "shutdown_timeout": 1.0, "keepalive_timeout": IDLE}
        express = Express(lambda: gateway.names, parts.book, parts.pool, accounts, new_id)
        lane = Lane(door.access, door.allowed_hosts, express.take, parts.pool.turn)
        runner = Runner(app, self.patience, door.max_body, lane, **options)
        await runner.setup()
        logging.getLogger("offloadd").addHandler(parts.control.meters.handler)
        logging.getLogger("offloadd").addHandler(self._recent)
        try:
            self.listeners = await open_listeners(server.listen, parts.manager)
            self.listeners.check(server)
            parts.manager.discard_rest()
            await self.listeners.serve(runner)
            yield
        finally:
            logging.getLogger("offloadd").removeHandler(self._recent)
            logging.getLogger("offloadd").removeHandler(parts.control.meters.handler)
            await runner.cleanup()
            accounts.flush()
            self.listeners.close()
            await gateway.close()
            parts.pool.close()

    def _door(self, server: ServerSpec, accounts: Accounts) -> Door:
        return Door(
            access=lambda: self._parts.server().access,
            allowed_hosts=self._allowed_hosts,
            meter=self._meter,
            patience=self.patience,
            max_body=server.max_body,
            bodies=self._bodies,
            settle=accounts.flush,
        )

    def _gateway(self, accounts: Accounts, door: Door) -> Gateway:
        return Gateway(
            book=self._parts.book,
            desired=self._parts.desired,
            pool=self._parts.pool,
            request_id=request_id,
            bears=lambda request: answer_headers(request, door),
            accounts=accounts,
            api_of=self._parts.hosts.api,
            may_use=lambda spec: caller().may_use(spec.name, spec.aliases),
        )

    def _routes(self, gateway: Gateway, accounts: Accounts) -> list[web.RouteDef]:
        """All but the control plane's own, which every app has."""
        parts = self._parts
        api_of, find = parts.hosts.api, gateway.find
        dialects = dialect_routes(gateway, accounts=accounts, api_of=api_of, look=self._look, keep=self._keep_loaded)
        return [
            *with_another_try([*gateway.routes(), *dialects], gateway.engines),
            borrow_route(parts.loans, lambda name: parts.reconciler.latest.loans.get(name, "waits to be looked at")),
            logs_route(parts.logs, self._runs, find, printable),
            *by_hand_routes(parts.wishes, find, parts.reconciler.decision),
            plan_route(parts.preview),
            *pull_routes(parts.pulls),
            ollama_pull_route(parts.pulls),
            *explain_routes(self._recent, self._look, find),
        ]

    def _look(self) -> Picture:
        """As the caller may see it."""
        return as_seen(self._parts.control.look())

    def _runs(self, instance: InstanceId) -> bool:
        return instance in self._parts.executor.alive()

    def _keep_loaded(self, model: ModelName, stay: Seconds) -> None:
        """A client's wish for how long the model's present instances stay after its last request."""
        views = self._parts.executor.views()
        live = [key for key, view in views.items() if key.model == model and view.state not in LEAVING]
        self._parts.keeping.wish(model, stay, live)
        self._parts.wake()

    def _served(self, served: Served) -> None:
        """One inference request is over. Whoever counts, keeps or explains them is told here."""
        self._parts.control.meters.served(served)
        self._recent.served(served)
        who = caller()
        # What is accounted for later is so in anybody's context: its key has no limits, else it would have been at once.
        if served.key and served.key == who.name:
            self._meter.spend(who, (served.prompt_tokens or 0) + (served.completion_tokens or 0))
        self._parts.recorder.served(served)

    def _allowed_hosts(self) -> frozenset[str]:
        """The names given by the present config, and those of the addresses that are really listened on."""
        server = self._parts.server()
        if self._host_names[0] is not server:
            self._host_names = (server, allowed_hosts(self.listeners.addresses, server.allowed_hosts))
        return self._host_names[1]
