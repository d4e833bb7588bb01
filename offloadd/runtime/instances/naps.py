"""One instance's sleep: what its engine is told and says, and the way from falling asleep to being awake. The planner judges."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn

from offloadd.backends.base import Backend, CanSleep
from offloadd.events import EventKind
from offloadd.runtime.instances import checks
from offloadd.runtime.instances.diary import Diary
from offloadd.runtime.instances.standing import Standing
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Endpoint, Naps, Placement, Probe, ProbeReply
from offloadd.state.observed import InstanceState
from offloadd.units import Bytes, Seconds, format_bytes, format_seconds

log = logging.getLogger(__name__)


class Sleeper:
    """Speaks to one engine that can sleep."""

    def __init__(
        self,
        backend: CanSleep,
        naps: Naps,
        endpoint: Endpoint,
        ask: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
    ) -> None:
        self._backend = backend
        self._naps = naps
        self._endpoint = endpoint
        self._ask = ask

    @property
    def level(self) -> int:
        """How deep it sleeps."""
        return self._naps.level

    async def fall_asleep(self) -> str:
        """Tell it to; empty when it says that it did, else why it did not."""
        return await self._tell(self._naps.sleep)

    async def wake_up(self) -> str:
        """The same for the way back."""
        return await self._tell(self._naps.wake)

    async def sleeps(self) -> bool | None:
        """Whether it sleeps by its own word; None when it does not say."""
        return self._backend.read_nap(await self._ask(self._endpoint, self._naps.asks))

    async def _tell(self, calls: Sequence[Probe]) -> str:
        for call in calls:
            reply = await self._ask(self._endpoint, call)
            if reply.status != 200:
                return f"{call.path}: {reply.error or f'status {reply.status}'}"
        return ""


def sleeper_of(
    backend: Backend,
    spec: ModelSpec,
    placement: Placement,
    endpoint: Endpoint,
    ask: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
) -> Sleeper | None:
    """Who speaks to an instance that was placed so that it can sleep; None where it was not, or its engine cannot."""
    naps = backend.naps(spec) if placement.asleep and isinstance(backend, CanSleep) else None
    return None if naps is None or not isinstance(backend, CanSleep) else Sleeper(backend, naps, endpoint, ask)


class Sleep:
    """Where one instance that can sleep is between its falling asleep and its next token."""

    def __init__(self, standing: Standing, diary: Diary, sleeper: Sleeper, until_ready: Callable[[], Awaitable[None]]) -> None:
        self._standing = standing
        self._diary = diary
        self._sleeper = sleeper
        self._until_ready = until_ready

    async def found_asleep(self) -> bool:
        """Whether what an earlier daemon left sleeps; it is then in the state that its memory's books are in."""
        standing = self._standing
        asleep: bool | None = None

        async def told() -> bool:
            nonlocal asleep
            asleep = await self._sleeper.sleeps()
            return asleep is not None

        await checks.until(told)
        written = self._diary.life.asleep
        if asleep and standing.state is InstanceState.LOADING:
            now = standing.now()
            standing.hear()
            if written is None:  # it fell asleep, and nobody has seen its memory come free
                standing.slept_at = now
            standing.enter(InstanceState.FALLING_ASLEEP if written is None else InstanceState.SLEEPING)
        elif not asleep and written is not None:
            standing.placement = standing.action.placement  # somebody has woken it: what it holds must be on the books
            await self._diary.note(asleep=None)
        return bool(asleep)

    async def fall_asleep(self) -> None:
        """Tell it to, and believe no more than that it said so."""
        problem = await self._sleeper.fall_asleep()
        if problem:
            await self._be_sick(f"it cannot be put to sleep: {problem}")
        self._standing.hear()
        self._standing.slept_at = self._standing.now()
        self._standing.changed()

    async def nap(self) -> None:
        """From its word that it sleeps to its next token. Whether the memory came back is the planner's to see."""
        standing = self._standing
        while standing.state is InstanceState.FALLING_ASLEEP and standing.keeps is None:
            await standing.told(checks.PROBE_SLOWEST)
        keeps = standing.keeps
        if standing.state is InstanceState.FALLING_ASLEEP and keeps is not None:
            await self._diary.note(asleep=keeps)  # ahead of the books: a daemon after us must not promise it more
            if standing.state is InstanceState.FALLING_ASLEEP:
                self._rest(keeps)  # what is written, though it may have been told another figure meanwhile
        while standing.state is InstanceState.SLEEPING:
            if not await standing.told(checks.LIVENESS_EVERY):
                await self._look()
        if standing.state is InstanceState.WAKING:
            await self._wake()

    def _rest(self, keeps: Mapping[DeviceId, Bytes]) -> None:
        standing = self._standing
        standing.reduce(keeps)
        held = format_bytes(standing.placement.total)
        self._say(EventKind.INSTANCE_ASLEEP, f"sleeps (level {self._sleeper.level}) with {held}")
        standing.enter(InstanceState.SLEEPING)

    async def _look(self) -> None:
        standing = self._standing
        asleep = await self._sleeper.sleeps()
        if asleep:
            standing.hear()
        elif asleep is None:
            standing.misses += 1
        else:
            standing.fault = "it is awake though nobody here woke it, and holds memory that it is not promised"
            log.warning("%s: %s", standing.id, standing.fault, extra=standing.about(EventKind.INSTANCE_SICK))
        if not asleep:
            standing.changed()

    async def _wake(self) -> None:
        standing = self._standing
        began = standing.now()
        await self._diary.note(asleep=None)
        problem = await self._sleeper.wake_up()
        if problem:
            await self._be_sick(f"it does not wake: {problem}")
        await self._until_ready()
        standing.slept_at, standing.keeps = None, None
        standing.hear()
        if standing.state is InstanceState.WAKING:
            took = Seconds(standing.now() - began)
            self._say(EventKind.INSTANCE_AWAKE, f"awake after {format_seconds(took)}", wake_s=took)
            standing.enter(InstanceState.READY)

    async def _be_sick(self, fault: str) -> NoReturn:
        """It cannot go on, and the planner ends it. Bytes that some client still gets do not make it well again."""
        standing = self._standing
        log.warning("%s: %s", standing.id, fault, extra=standing.about(EventKind.INSTANCE_SICK))
        while True:
            standing.fault = fault
            standing.changed()
            await asyncio.sleep(checks.LIVENESS_EVERY)

    def _say(self, kind: EventKind, text: str, **data: object) -> None:
        log.info("%s: %s", self._standing.id, text, extra=self._standing.about(kind, **data))
