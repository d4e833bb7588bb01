"""The loop: wait for a wake or for the plan's own time, look, plan, hand over. One cycle never waits for anything."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping

from offloadd.clock import Clock
from offloadd.plan.planner import plan
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.ids import ModelName
from offloadd.state.observed import ObservedState
from offloadd.units import Instant, Seconds

log = logging.getLogger(__name__)

RESYNC = Seconds(10)
"""A cycle at least this often, whatever happens: events only make it sooner."""
SPACING = Seconds(0.005)
"""Least time between cycles, so that a burst of events costs one."""
_AFTER_ERROR = Seconds(1)
_NUMBERS = re.compile(r"\d+(\.\d+)?( (ms|s|min|h|d|B|KiB|MiB|GiB))?")


class Reconciler:
    """Brings what runs towards what is desired, one plan after another."""

    def __init__(
        self,
        *,
        clock: Clock,
        desired: Callable[[], DesiredState],
        observed: Callable[[], ObservedState],
        demand: Callable[[], Demand],
        apply: Callable[[Plan], None],
    ) -> None:
        self._clock = clock
        self._desired = desired
        self._observed = observed
        self._demand = demand
        self._apply = apply
        self._woken = asyncio.Event()
        self._said: dict[ModelName, str] = {}
        self.latest = Plan()
        self.completed_at: Instant = clock.now()
        self.problem = ""
        """Why the last cycle failed; empty when it did not."""

    def wake(self) -> None:
        """Plan soon: something is different."""
        self._woken.set()

    async def run(self) -> None:
        """Cycle for ever. An error in a cycle is logged and shown, and the next cycle tries again."""
        while True:
            self._woken.clear()
            pause = self._try_cycle()
            try:
                async with asyncio.timeout(pause):
                    await self._woken.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(SPACING)

    def cycle(self) -> Plan:
        """Look, plan and hand over, in one synchronous step: nothing changes between the look and the effects' begin."""
        now = self._clock.now()
        desired = self._desired()
        answer = plan(desired, self._observed(), self._demand(), now=now)
        self.latest = answer
        self._apply(answer)
        self._report(answer.decisions)
        self.completed_at = now
        return answer

    def _try_cycle(self) -> Seconds:
        try:
            answer = self.cycle()
        except Exception as error:
            log.exception("reconcile cycle failed")
            self.problem = f"{type(error).__name__}: {error}"
            return _AFTER_ERROR
        self.problem = ""
        if answer.wake_at is None:
            return RESYNC
        return Seconds(max(0.0, min(RESYNC, answer.wake_at - self._clock.now())))

    def _report(self, decisions: Mapping[ModelName, Decision]) -> None:
        """Log a decision when it says something new, numbers aside."""
        for name, decision in decisions.items():
            gist = f"{decision.state} {_NUMBERS.sub('#', decision.sentence)}"
            if self._said.get(name) != gist:
                level = logging.WARNING if decision.state in (ModelState.FAILED, ModelState.BACKOFF) else logging.INFO
                hint = f" ({decision.hint})" if decision.hint else ""
                log.log(level, "%s: %s: %s%s", name, decision.state, decision.sentence, hint)
                self._said[name] = gist
        self._said = {name: gist for name, gist in self._said.items() if name in decisions}
