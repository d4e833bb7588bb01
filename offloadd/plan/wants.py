"""How many instances of a model are wanted, by its run mode and by its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offloadd.plan.draft import Draft, requests_run
from offloadd.state.actions import StopReason
from offloadd.state.demand import Wish
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.observed import LEAVING, RESTING, InstanceView
from offloadd.units import Instant, counted, format_seconds

EVER = Instant(float("-inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """`count` instances, because of `why`. `since` is when the wish began: the earlier, the sooner it is served."""

    spec: ModelSpec
    count: int
    why: str
    most: int = 0
    """Up to so many may run while requests keep them busy."""
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
    """What the config, an operator's hand and the requests ask for now."""
    wish = draft.demand.wishes.get(spec.name)
    if wish is not None and wish.load:
        return _running(spec, why="loaded by hand", since=wish.since, urgent=True)
    if spec.run is RunMode.NEVER:
        return Want(spec=spec, count=0, why="run: never")
    if wish is not None:
        return _on_demand(draft, spec, wish)
    if spec.run is RunMode.ALWAYS:
        return _running(spec, why="run: always", urgent=True)
    return _on_demand(draft, spec)


def unloaded_by_hand(draft: Draft, view: InstanceView) -> bool:
    """Whether an operator has sent it away. Those that were started later have come for requests."""
    wish = draft.demand.wishes.get(view.model)
    return wish is not None and not wish.load and view.id.number <= wish.newest


def _running(spec: ModelSpec, *, why: str, since: Instant = EVER, urgent: bool = False) -> Want:
    count = max(1, spec.replicas.min)
    return Want(spec=spec, count=count, most=max(count, spec.replicas.max), why=why, since=since, urgent=urgent)


def _on_demand(draft: Draft, spec: ModelSpec, wish: Wish | None = None) -> Want:
    waiting = draft.demand.waiting.get(spec.name)
    if waiting is not None:
        why = counted(waiting.count, "request waits", "requests wait")
        return _running(spec, why=why, since=waiting.oldest, urgent=True)
    views = [view for view in draft.instances(spec.name) if not unloaded_by_hand(draft, view)]
    live = [view for view in views if view.state not in LEAVING]
    if not live:
        why = "no request wants it" if wish is None else "unloaded by hand, and no request has come since"
        return Want(spec=spec, count=0, why=why)
    # What still runs on one that drains is use of the model too: its replacement is not idle.
    held = sum(draft.leases(view) for view in views)
    if held:
        return _running(spec, why=requests_run(held), since=draft.now)
    if all(view.state in RESTING for view in live):
        return Want(spec=spec, count=0, why="no request wants it", end=StopReason.IDLE)
    return _idle(draft, spec, live)


def _idle(draft: Draft, spec: ModelSpec, live: Sequence[InstanceView]) -> Want:
    if not spec.idle_timeout:
        return _running(spec, why="idle_timeout: 0 keeps it loaded", since=draft.now)
    last_used = max(draft.last_used(view) for view in live)
    deadline = Instant(last_used + spec.idle_timeout)
    idle = format_seconds(draft.now - last_used)
    if draft.now >= deadline:
        return Want(spec=spec, count=0, why=f"idle for {idle}, idle_timeout is reached", end=StopReason.IDLE)
    draft.wake(deadline)
    return _running(spec, why=f"idle for {idle}", since=draft.now)
