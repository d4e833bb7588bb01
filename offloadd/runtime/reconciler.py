"""The loop: wait for a wake or for the plan's own time, look, plan, hand over. One cycle never waits for anything."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping

from offloadd.clock import Clock
from offloadd.events import EventKind, about
from offloadd.plan.planner import plan
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.ids import ModelName
from offloadd.state.observed import ObservedState
from offloadd.units import Instant, Seconds, gist

log = logging.getLogger(__name__)

RESYNC = Seconds(10)
"""A cycle at least this often, whatever happens: events only make it sooner."""
ASLEEP = Seconds(20)
"""Longer than any two cycles are apart while we run: what was not heard in that time says nothing about anybody."""
SPACING = Seconds(0.005)
"""Least time between cycles, so that a burst of events costs one."""
A_MOMENT = Seconds(0.05)
"""What nobody waits for is planned for so much later."""
_IN_USE = re.compile(r", \d+ requests? runs?\b")
_AFTER_ERROR = Seconds(1)


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
        woke_up: Callable[[], None],
        took: Callable[[Seconds], None] = lambda _: None,
    ) -> None:
        """`woke_up` is called ahead of a cycle that comes so late that the whole daemon must have stood still.

        `took` is told how long each cycle took.
        """
        self._clock = clock
        self._desired = desired
        self._observed = observed
        self._demand = demand
        self._apply = apply
        self._woke_up = woke_up
        self._took = took
        self._woken = asyncio.Event()
        self._later: asyncio.TimerHandle | None = None
        self._said: dict[ModelName, str] = {}
        self._reported: Mapping[ModelName, Decision] = {}
        self.latest = Plan()
        self._tried_at: Instant = clock.now()
        self.completed_at: Instant = self._tried_at
        self.problem = ""
        """Why the last cycle failed; empty when it did not."""

    def wake(self) -> None:
        """Plan soon: something is different."""
        self._woken.set()

    def wake_later(self) -> None:
        """Plan in a moment: something is different that nobody waits for, and a client's next request may come before."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(A_MOMENT, self._wake_now)

    def _wake_now(self) -> None:
        self._later = None
        self.wake()

    def decision(self, model: ModelName) -> Decision | None:
        """The latest plan's on this model."""
        return self.latest.decisions.get(model)

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
        if now - self._tried_at > ASLEEP:
            said = about(EventKind.DAEMON_SUSPENDED)
            log.warning("no cycle for %g s: the machine or the daemon was suspended", now - self._tried_at, extra=said)
            self._woke_up()
        self._tried_at = now
        desired = self._desired()
        answer = plan(desired, self._observed(), self._demand(), now=now)
        self.latest = answer
        self._apply(answer)
        self._report(answer.decisions)
        self.completed_at = now
        self._took(Seconds(self._clock.now() - now))
        return answer

    def _try_cycle(self) -> Seconds:
        try:
            answer = self.cycle()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if problem != self.problem:
                log.exception("reconcile cycle failed", extra=about(EventKind.INTERNAL_ERROR))
            self.problem = problem
            return _AFTER_ERROR
        self.problem = ""
        if answer.wake_at is None:
            return RESYNC
        return Seconds(max(0.0, min(RESYNC, answer.wake_at - self._clock.now())))

    def _report(self, decisions: Mapping[ModelName, Decision]) -> None:
        """Log a decision when it says something new, numbers and the coming and going of requests aside."""
        for name, decision in decisions.items():
            if self._reported.get(name) is decision:
                continue  # the very same one, as for all that rest
            trouble = decision.state in (ModelState.FAILED, ModelState.BACKOFF)
            said = f"{decision.state}: {decision.sentence}" if trouble else decision.sentence
            saying = gist(_IN_USE.sub("", said))
            if self._said.get(name) != saying:
                level = logging.WARNING if trouble else logging.INFO
                hint = f" ({decision.hint})" if decision.hint else ""
                log.log(level, "%s: %s%s", name, said, hint, extra=about(EventKind.DECISION, model=name, state=decision.state))
                self._said[name] = saying
        self._reported = decisions
        self._said = {name: saying for name, saying in self._said.items() if name in decisions}
