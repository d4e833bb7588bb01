"""How many instances of a model are wanted, by its run mode and by its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offloadd.plan.draft import Draft, requests_run
from offloadd.state.actions import StopReason
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.observed import LEAVING, InstanceView
from offloadd.units import Instant, counted, format_seconds

EVER = Instant(float("-inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """`count` instances, because of `why`. `since` is when the wish began: the earlier, the sooner it is served."""

    spec: ModelSpec
    count: int
    why: str
    since: Instant = EVER
    urgent: bool = False
    """Whether others may be made to leave for it. Without a request or `run: always` it takes only room that is there."""
    end: StopReason = StopReason.UNWANTED
    """Why instances beyond `count` are stopped."""

    @property
    def rank(self) -> tuple[int, float, str]:
        """Order in which wants are given memory: priority, then the longest wait."""
        return (-self.spec.priority, self.since, self.spec.name)


def wanted(draft: Draft, spec: ModelSpec) -> Want:
    """What the config and the requests ask for now."""
    if spec.run is RunMode.NEVER:
        return Want(spec=spec, count=0, why="run: never")
    if spec.run is RunMode.ALWAYS:
        return Want(spec=spec, count=max(1, spec.replicas.min), why="run: always", urgent=True)
    return _on_demand(draft, spec)


def _on_demand(draft: Draft, spec: ModelSpec) -> Want:
    count = max(1, spec.replicas.min)
    waiting = draft.demand.waiting.get(spec.name)
    if waiting is not None:
        return Want(
            spec=spec, count=count, why=counted(waiting.count, "request waits", "requests wait"), since=waiting.oldest, urgent=True
        )
    live = [view for view in draft.instances(spec.name) if view.state not in LEAVING]
    if not live:
        return Want(spec=spec, count=0, why="no request wants it")
    # What still runs on one that drains is use of the model too: its replacement is not idle.
    held = sum(draft.leases(view) for view in draft.instances(spec.name))
    if held:
        return Want(spec=spec, count=count, why=requests_run(held), since=draft.now)
    return _idle(draft, spec, count, live)


def _idle(draft: Draft, spec: ModelSpec, count: int, live: Sequence[InstanceView]) -> Want:
    if not spec.idle_timeout:
        return Want(spec=spec, count=count, why="idle_timeout: 0 keeps it loaded", since=draft.now)
    last_used = max(draft.last_used(view) for view in live)
    deadline = Instant(last_used + spec.idle_timeout)
    idle = format_seconds(draft.now - last_used)
    if draft.now >= deadline:
        return Want(spec=spec, count=0, why=f"idle for {idle}, idle_timeout is reached", end=StopReason.IDLE)
    draft.wake(deadline)
    return Want(spec=spec, count=count, why=f"idle for {idle}", since=draft.now)
