"""How one instance stands now: what its parts know in common. They write it, and nobody else; others are shown a view."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from offloadd.events import About, EventKind, about
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.evidence import machine_oom_kills
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Endpoint
from offloadd.state.life import Life
from offloadd.state.observed import InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds


class Standing:
    """Facts of one instance, and what it was told."""

    def __init__(self, action: StartInstance, tools: Tools) -> None:
        self.id = action.instance
        self.action = action
        self._changed = tools.changed
        self._clock = tools.clock
        self.state = InstanceState.STARTING
        self.started_at = self.since = tools.clock.now()
        self.adopted_at: Instant | None = None
        self.ready_at: Instant | None = None
        self.exposed: tuple[str, ...] = ()
        # Signs of life
        self.last_sign: Instant | None = None
        self.worked_at: Instant | None = None
        """Bytes came from it, or a canary was answered."""
        self.misses = 0
        self.fault = ""
        self.oom_kills = machine_oom_kills()
        """Of the whole machine, when it was last looked at."""
        # Naps
        self.placement = action.placement
        """What it is promised now."""
        self.slept_at: Instant | None = None
        self.keeps: Mapping[DeviceId, Bytes] | None = None
        """What it was seen to hold asleep."""
        self.free_before: Mapping[DeviceId, Bytes] = {}
        self.turned = asyncio.Event()
        """Told to fall asleep, that it may rest, or to wake."""
        # Its end
        self.drain_deadline: Instant | None = None
        self.stop_reason: StopReason | None = None
        """None while nobody has told it to end."""
        self.stop_why = ""
        self.stop_limit: Seconds | None = None
        self.stopping = asyncio.Event()
        self.stuck = False

    def now(self) -> Instant:
        """By the clock that all its instants are of."""
        return self._clock.now()

    def changed(self) -> None:
        """Something of it is different that others judge by."""
        self._changed(self.id)

    def take_up(self, life: Life) -> None:
        """Stand where an earlier daemon left it."""
        self.state = InstanceState.ORPHANED
        self.started_at, self.ready_at = life.started_at, life.ready_at
        if life.asleep is not None:
            self.reduce(life.asleep)

    def reduce(self, keeps: Mapping[DeviceId, Bytes]) -> None:
        """Be promised only so much of its GPUs: what it holds of them asleep."""
        awake = self.action.placement
        self.placement = replace(awake, reserved={**awake.reserved, **keeps})

    def enter(self, state: InstanceState) -> None:
        """Be in another state from now on."""
        self.state, self.since = state, self.now()
        self.changed()

    def end(self) -> Instant:
        """It has exited, and when. That is told by whoever puts its record on the books."""
        self.state, self.since = InstanceState.EXITED, self.now()
        return self.since

    def hear(self) -> None:
        """Its working loop answered."""
        self.last_sign = self.now()
        self.misses = 0

    async def told(self, limit: Seconds) -> bool:
        """Whether it was told to do something else (`turned`), within that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self.turned.wait()
        told = self.turned.is_set()
        self.turned.clear()
        return told

    def about(self, kind: EventKind, **data: object) -> dict[str, About]:
        """An event of it, to go with a line of the log."""
        return about(kind, model=self.id.model, instance=self.id, backend=self.action.candidate.backend, **data)

    def view(self, pid: int | None, endpoint: Endpoint | None) -> InstanceView:
        """What others see of it, with its process where there is one."""
        candidate = self.action.candidate
        return InstanceView(
            id=self.id,
            spec=self.action.spec,
            backend=candidate.backend,
            fingerprint=candidate.fingerprint,
            footprint_key=candidate.footprint_key,
            placement=self.placement,
            awake=None if self.placement is self.action.placement else self.action.placement,
            slept_at=self.slept_at,
            free_before=self.free_before,
            state=self.state,
            since=self.since,
            started_at=self.started_at,
            adopted_at=self.adopted_at,
            ready_at=self.ready_at,
            drain_deadline=self.drain_deadline,
            last_sign=self.last_sign,
            misses=self.misses,
            fault=self.fault,
            stuck=self.stuck,
            exposed=self.exposed,
            pid=pid,
            endpoint=endpoint,
        )
