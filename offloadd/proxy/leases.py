"""LeaseBook: who waits for which model, and who holds which instance. Asks admission and records in one synchronous step."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offloadd.clock import Clock
from offloadd.errors import RequestError
from offloadd.plan.admission import Granted, Queued, Refused, admit, admit_sole, retry_after
from offloadd.plan.balance import Seat, pick
from offloadd.proxy.affinity import Memory
from offloadd.proxy.holds import Holds
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.suspects import Suspects
from offloadd.state.actions import Decision
from offloadd.state.demand import Demand, Waiting
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, InstanceId, ModelName
from offloadd.state.observed import Signal
from offloadd.units import Instant, Seconds, format_seconds

MAX_WAITING = 8192
"""Requests that may wait at once, whatever they wait for."""
NO_TIME = Seconds(0)
KEEPALIVE = Seconds(5)
"""How often a request that waits may give its client a sign of life."""


@dataclass(slots=True, eq=False)
class _Waiter:
    since: Instant
    granted: asyncio.Future[Lease]
    conversation: int | None = None


@dataclass(slots=True)
class _Line:
    """One model's queue."""

    spec: ModelSpec
    backend: BackendName | None = None
    """The engine that its requests ask for by name."""
    waiters: deque[_Waiter] = field(default_factory=deque)


class LeaseBook:
    """Queues per model, first come first served, and leases per instance."""

    def __init__(
        self,
        *,
        clock: Clock,
        hosts: Callable[[ModelName], Sequence[Host]],
        decision: Callable[[ModelName], Decision | None],
        wake: Callable[[], None],
        rested: Callable[[], None] | None = None,
        waits: Callable[[ModelName, str], None] | None = None,
        signal: Callable[[InstanceId], Signal | None] = lambda _: None,
    ) -> None:
        """`wake` is called when something is to be planned, `rested` where that is only since an instance has nothing more to do.

        `waits` is told of each request that is queued, and why it has to wait. `signal` is an engine's word of its own queue.
        """
        self._signal = signal
        self._waits = waits
        self._clock = clock
        self._hosts = hosts
        self._decision = decision
        self._wake = wake
        self._rested = rested or wake
        self._lines: dict[ModelName, _Line] = {}
        self._named: dict[ModelName, dict[BackendName, _Line]] = {}
        """Requests that name an engine stand in a line of their own: those of another must not wait for it."""
        self._asked: dict[ModelName, dict[BackendName, Instant]] = {}
        self._last_used: dict[ModelName, Instant] = {}
        self._idle_since: dict[InstanceId, Instant] = {}
        self._waiting = 0
        """Requests that are in any line, or have just been granted what they waited for."""
        self._closed = ""
        self.memory = Memory(clock)
        """Of conversations, and of how instances have fared."""
        self.suspects = Suspects(clock)
        self._holds = Holds(self.memory.forget)

    async def acquire(
        self,
        spec: ModelSpec,
        *,
        while_waiting: Callable[[Seconds], Awaitable[None]] | None = None,
        conversation: int | None = None,
        backend: str | None = None,
    ) -> Lease:
        """Wait for an instance of the model; RequestError when it is refused or has waited too long.

        A `conversation` returns to the instance that has it in its cache, as long as that is not much busier than the others.
        While it waits, `while_waiting` is called every KEEPALIVE with the time waited: a streaming client may be sent a sign then.
        If it raises, the request leaves the queue. `backend` is the only engine that will do.
        Whoever gets a lease must `release` it.
        """
        if self._closed:
            raise RequestError(503, "shutting_down", self._closed, retry_after=Seconds(5))
        now = self._clock.now()
        self._last_used[spec.name] = now
        line = self._line(spec, None if backend is None else BackendName(backend), now)
        lease = self._try(line, len(line.waiters), since=now, now=now, conversation=conversation)
        if lease is not None:
            return lease
        if self._waiting >= MAX_WAITING:
            message = f"{MAX_WAITING} requests wait already, over all models"
            raise RequestError(503, "too_many_waiting", message, retry_after=Seconds(5))
        return await self._wait(line, _Waiter(now, asyncio.get_running_loop().create_future(), conversation), while_waiting)

    def grant(self, spec: ModelSpec, conversation: int | None = None) -> Lease | None:
        """A lease at once, as `acquire` would give it; None where the request would have to wait or be refused."""
        if self._closed:
            return None
        now = self._clock.now()
        self._last_used[spec.name] = now
        line = self._line(spec, None, now)
        if not line.waiters and (lease := self._grant_sole(spec, conversation, now)) is not None:
            return lease
        try:
            return self._try(line, len(line.waiters), since=now, now=now, conversation=conversation)
        except RequestError:
            return None  # whoever asks again is told why

    def _grant_sole(self, spec: ModelSpec, conversation: int | None, now: Instant) -> Lease | None:
        """The same where there is nothing to choose, which is found out at once; None where it takes a closer look."""
        hosts = self._hosts(spec.name)
        if len(hosts) != 1:
            return None
        host = hosts[0]
        if host.instance in self.memory.ailing:
            return None
        why = admit_sole(host.instance, self._holds.counts.get(host.instance, 0), host.slots, self._signal(host.instance), now=now)
        if why is None:
            return None
        if conversation is not None:
            self.memory.put(conversation, host.instance)
        lease = self._record(host, why, waited=NO_TIME)
        lease.hedge_after = spec.queue.hedge_after
        return lease

    def hosts(self, model: ModelName) -> Sequence[Host]:
        """The model's ready instances: the same object as long as they are the same."""
        return self._hosts(model)

    def borrow(self, spec: ModelSpec) -> Lease | None:
        """A lease at once and beside the slots, for what costs the instance nothing; None when none is ready.

        It does not count as use: whoever only looks keeps no model loaded.
        """
        hosts = [] if self._closed else self._hosts(spec.name)
        return self._record(hosts[0], "asked for by path", waited=Seconds(0), beside=True) if hosts else None

    def release(self, lease: Lease) -> None:
        """The request is over: its slot goes to the next in line, as soon as it is free."""
        if lease.over is not None and not lease.over.done():
            lease.over.add_done_callback(lambda _: self.release(lease))
            return
        instance, now = lease.host.instance, self._clock.now()
        known = self._holds.remove(lease)
        if lease.beside:
            return
        idle = instance not in self._holds.counts
        if idle and known:
            self._idle_since[instance] = now
        if instance.model in self._lines:  # else the config has dropped it meanwhile
            self._last_used[instance.model] = now
        if self._waiting:
            self._serve(instance.model)
        if self._waiting:
            self._wake()
        elif idle:  # else nothing has changed that a plan could turn on
            self._rested()

    def forget(self, instance: InstanceId) -> None:
        """It is off the books."""
        self._holds.forget(instance)
        self._idle_since.pop(instance, None)
        self.memory.forget(instance)

    def hang_up(self, instance: InstanceId, why: str, *, died: bool = False) -> None:
        """Tell every request on the instance to end."""
        for lease in self._holds.of(instance):
            lease.revoke(why, died=died)

    def serve_all(self) -> None:
        """Grant or refuse what waits, as far as the present instances and decisions allow."""
        for model in list(self._lines):
            self._serve(model)

    def close(self, why: str) -> None:
        """Take no new request, and refuse those that wait."""
        self._closed = why
        for line in self._all_lines():
            _refuse_all(line, RequestError(503, "shutting_down", why, retry_after=Seconds(5)))

    def running(self) -> frozenset[Lease]:
        """Every lease that is held now."""
        return self._holds.all()

    def demand(self) -> Demand:
        """What the planner needs to know."""
        lines = {model: [waiter for line in self._lines_of(model) for waiter in line.waiters] for model in self._lines}
        oldest = {model: min(waiter.since for waiter in waiters) for model, waiters in lines.items() if waiters}
        return Demand(
            waiting={model: Waiting(count=len(lines[model]), oldest=since) for model, since in oldest.items()},
            named={model: dict(asked) for model, asked in self._asked.items()},
            waiting_for={
                model: frozenset(name for name, line in named.items() if line.waiters) for model, named in self._named.items()
            },
            leases=dict(self._holds.counts),
            last_used=dict(self._last_used),
            idle_since={instance: at for instance, at in self._idle_since.items() if instance not in self._holds.counts},
        )

    def forget_models(self, kept: Callable[[ModelName], ModelSpec | None]) -> None:
        """Follow a new config: refuse waiters of models that are gone, and keep books of no others."""
        for model in list(self._lines):
            spec = kept(model)
            if spec is not None:
                for line in self._lines_of(model):
                    line.spec = spec
                continue
            for line in self._lines_of(model):
                why = f"{model} was removed from the config while the request waited"
                _refuse_all(line, RequestError(404, "model_not_found", why))
            del self._lines[model]
            for books in (self._named, self._asked, self._last_used):
                books.pop(model, None)

    async def _wait(self, line: _Line, waiter: _Waiter, told: Callable[[Seconds], Awaitable[None]] | None) -> Lease:
        line.waiters.append(waiter)
        self._waiting += 1
        decision = self._decision(line.spec.name)
        if self._waits is not None:
            self._waits(line.spec.name, decision.sentence if decision else "it is not planned yet")
        self._wake()
        limit = line.spec.queue.max_wait
        try:
            async with asyncio.timeout(limit):
                return await (waiter.granted if told is None else self._granted(waiter, told))
        except BaseException as error:
            self._leave(line, waiter)
            if isinstance(error, TimeoutError):
                raise self._too_late(line.spec, limit) from None
            raise
        finally:
            self._waiting -= 1
            del waiter.granted  # a refusal in it knows where it was raised, which is in here: a ring that would keep the request

    async def _granted(self, waiter: _Waiter, told: Callable[[Seconds], Awaitable[None]]) -> Lease:
        """The lease. A client that takes no bytes must not keep us from seeing that it is granted."""
        while not waiter.granted.done():
            await asyncio.wait({waiter.granted}, timeout=KEEPALIVE)
            if not waiter.granted.done():
                telling = asyncio.ensure_future(told(Seconds(self._clock.now() - waiter.since)))
                try:
                    await asyncio.wait(_futures(waiter.granted, telling), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    telling.cancel()
                    await asyncio.gather(telling, return_exceptions=True)
                if not telling.cancelled():
                    telling.result()
        return waiter.granted.result()

    def _leave(self, line: _Line, waiter: _Waiter) -> None:
        """Out of the queue without a lease. A grant that came in the same moment is given back."""
        if waiter in line.waiters:
            line.waiters.remove(waiter)
            self._wake()
        if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self.release(waiter.granted.result())

    def _too_late(self, spec: ModelSpec, limit: Seconds) -> RequestError:
        decision = self._decision(spec.name)
        state = f"; {spec.name} {decision.sentence}" if decision else ""
        message = f"waited {format_seconds(limit)} for {spec.name} (queue.max_wait){state}"
        return RequestError(504, "wait_timeout", message, retry_after=retry_after(decision))

    def _serve(self, model: ModelName) -> None:
        for line in self._lines_of(model):
            self._serve_line(line)

    def _serve_line(self, line: _Line) -> None:
        while line.waiters:
            waiter = line.waiters[0]
            if waiter.granted.done():
                line.waiters.popleft()
                continue
            try:
                lease = self._try(line, 0, since=waiter.since, now=self._clock.now(), conversation=waiter.conversation)
            except RequestError as refusal:
                _refuse_all(line, refusal)
                return
            if lease is None:
                return
            line.waiters.popleft()
            waiter.granted.set_result(lease)

    def _line(self, spec: ModelSpec, backend: BackendName | None, now: Instant) -> _Line:
        """Where a request for this engine, or for any, queues."""
        line = self._lines.get(spec.name) or self._lines.setdefault(spec.name, _Line(spec))
        if backend is not None:
            self._asked.setdefault(spec.name, {})[backend] = now
            line = self._named.setdefault(spec.name, {}).setdefault(backend, _Line(spec, backend))
        line.spec = spec
        return line

    def _lines_of(self, model: ModelName) -> list[_Line]:
        plain = self._lines.get(model)
        return [*([plain] if plain else []), *self._named.get(model, {}).values()]

    def _all_lines(self) -> list[_Line]:
        return [line for model in self._lines for line in self._lines_of(model)]

    def _try(self, line: _Line, waiting: int, *, since: Instant, now: Instant, conversation: int | None = None) -> Lease | None:
        spec = line.spec
        hosts = self._hosts(spec.name)
        if line.backend is not None:
            hosts = [host for host in hosts if host.backend == line.backend]
        known = self.memory.place(conversation) if len(hosts) > 1 else None
        seats = [self._seat(hosts[0])] if len(hosts) == 1 else [self._seat(host) for host in hosts]
        answer = admit(spec, self._decision(spec.name), seats, waiting, now=now, known=known)
        match answer:
            case Granted():
                host = hosts[0] if len(hosts) == 1 else next(h for h in hosts if h.instance == answer.instance)
                self.memory.put(conversation, host.instance)
                lease = self._record(host, answer.why, waited=Seconds(now - since))
                lease.hedge_after = spec.queue.hedge_after
                return lease
            case Queued():
                return None
            case Refused():
                raise RequestError(answer.status, answer.code, answer.message, retry_after=answer.retry_after)

    def _seat(self, host: Host) -> Seat:
        held, standing = self._holds.counts.get(host.instance, 0), self.memory.standing(host.instance)
        return Seat(
            instance=host.instance,
            backend=host.backend,
            leases=held,
            slots=host.slots,
            standing=standing,
            signal=self._signal(host.instance),
        )

    def move(self, lease: Lease, why: str) -> bool:
        """Give a lease another instance of the same engine, if one has a free slot now; it is then of the old one no more."""
        old, other = lease.host, self._other(lease)
        if other is None:
            return False
        self._holds.remove(lease)
        lease.host = other
        lease.why = f"{other.instance} took over from {old.instance}: {why}"
        lease.future = None
        lease.crowded = False
        self._holds.add(lease)
        return True

    def hedge(self, lease: Lease) -> Lease | None:
        """A second lease for the same request, on another instance of the same engine; None when that would take from others."""
        other = self._other(lease)
        if other is None or any(line.waiters for line in self._lines_of(lease.host.instance.model)):
            return None
        return self._record(other, lease.why, waited=Seconds(0))

    def swap(self, lease: Lease, other: Lease, why: str) -> None:
        """Change the instances of two leases that are both held: what was the one's is the other's now, its end included."""
        self._holds.swap(lease, other)
        lease.why = why

    def _other(self, lease: Lease) -> Host | None:
        """Another instance of the same engine with a free slot."""
        old = lease.host
        others = [host for host in self._hosts(old.instance.model) if host.instance != old.instance and host.backend == old.backend]
        seat = pick([self._seat(host) for host in others], now=self._clock.now())
        if seat is None or lease.beside or self._closed:
            return None
        return next(host for host in others if host.instance == seat.instance)

    def _record(self, host: Host, why: str, *, waited: Seconds, beside: bool = False) -> Lease:
        lease = Lease(host=host, why=why, waited=waited, beside=beside)
        self._holds.add(lease)
        return lease


def _futures(*each: asyncio.Future[Any]) -> set[asyncio.Future[Any]]:
    return set(each)


def _refuse_all(line: _Line, refusal: RequestError) -> None:
    while line.waiters:
        waiter = line.waiters.popleft()
        if not waiter.granted.done():
            waiter.granted.set_exception(refusal)
