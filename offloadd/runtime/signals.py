"""How busy engines say that they are: asked only while something runs, and there is a choice to make by it or somebody looks on.

Nobody waits for the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from offloadd.backends.base import TellsLoad
from offloadd.clock import Clock
from offloadd.plan.balance import HEARD
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import InstanceId
from offloadd.state.launch import Endpoint, EngineLoad, Probe, ProbeReply
from offloadd.state.observed import Signal
from offloadd.units import Instant, Seconds

EVERY = Seconds(3)
"""How often each is asked while that matters. vLLM's metrics are tens of kilobytes."""
WITHIN = Seconds(1)
"""An answer that takes longer says nothing about now."""
LOOKED_ON = Seconds(60)
"""For so long after somebody looked, engines are asked for those who look: Prometheus comes four times a minute, as a rule."""
AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An instance that can be asked."""

    instance: InstanceId
    spec: ModelSpec
    endpoint: Endpoint
    backend: TellsLoad


class Signals:
    """The latest word of each instance that there is a choice about. What was not told, or not in time, is not known."""

    def __init__(
        self,
        *,
        clock: Clock,
        probe: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
        choices: Callable[[Mapping[InstanceId, int], bool], list[Asked]],
        held: Callable[[], Mapping[InstanceId, int]],
    ) -> None:
        """`choices` are the instances to ask now, given our own requests on each (`held`), and whether somebody looks on.

        None where nothing is to be chosen, unless somebody does.
        """
        self._clock = clock
        self._probe = probe
        self._choices = choices
        self._held = held
        self._latest: dict[InstanceId, Signal] = {}
        self._seats = asyncio.Semaphore(AT_ONCE)
        self._looked: Instant | None = None

    def of(self, instance: InstanceId) -> Signal | None:
        """What it said last."""
        return self._latest.get(instance)

    def told(self) -> Mapping[InstanceId, Signal]:
        """What each said a moment ago, to be shown; nothing of those that have not been asked since."""
        now = self._clock.now()
        return {key: signal for key, signal in self._latest.items() if now - signal.at <= HEARD}

    def look(self) -> None:
        """Somebody wants to know: whoever works is asked for a while, also where nothing is to be chosen by it."""
        self._looked = self._clock.now()

    async def attend(self) -> None:
        """One round, and the pause after it. Nothing is kept of those that are not asked any more."""
        held = self._held()
        looked_on = self._looked is not None and self._clock.now() - self._looked <= LOOKED_ON
        asked = self._choices(held, looked_on) if held else []
        told = await asyncio.gather(*(self._ask(each) for each in asked))
        self._latest = {each.instance: signal for each, signal in zip(asked, told, strict=True) if signal is not None}
        await asyncio.sleep(EVERY)

    async def _ask(self, each: Asked) -> Signal | None:
        question = each.backend.load_probe(each.spec)
        if question is None:
            return None
        async with self._seats:
            before = self._held().get(each.instance, 0)
            reply = await self._probe(each.endpoint, Probe(path=question.path, timeout=WITHIN))
            # What came or went meanwhile may be in the answer or not: who is not surely a stranger's request is not counted as one.
            ours = max(before, self._held().get(each.instance, 0))
        load = each.backend.read_load(each.spec, reply)
        return None if load is None else _signal(load, ours, self._clock)


def _signal(load: EngineLoad, ours: int, clock: Clock) -> Signal:
    beyond = max(0, load.running + load.waiting - ours)
    return Signal(beyond=beyond, running=load.running, waiting=load.waiting, cache=load.cache, at=clock.now())
