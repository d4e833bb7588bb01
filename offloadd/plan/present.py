"""A model's instances as far as one plan goes: those that the config asks for, the old ones, and those too many."""

from __future__ import annotations

from collections.abc import Sequence

from offloadd.plan.draft import Draft
from offloadd.plan.sleep import put_down
from offloadd.plan.upkeep import worn
from offloadd.plan.wants import Want, unloaded_by_hand
from offloadd.state.actions import StopReason
from offloadd.state.desired import ModelSpec
from offloadd.state.observed import LEAVING, RESTING, InstanceState, InstanceView
from offloadd.units import Instant, Seconds, format_seconds

SPARE_IDLE = Seconds(60)
"""A replica beyond those that are always wanted leaves after this long without a request, or idle_timeout where that is less."""


def present(draft: Draft, spec: ModelSpec) -> tuple[list[InstanceView], list[InstanceView]]:
    """The model's instances that stay as far as this plan goes: those that the config asks for, and the stale ones."""
    views = [view for view in draft.instances(spec.name) if view.state not in LEAVING and not draft.leaves(view)]
    stale = [view for view in views if _is_old(draft, spec, view) or outranked(draft, spec, view)]
    return [view for view in views if view not in stale], stale


def outranked(draft: Draft, spec: ModelSpec, view: InstanceView) -> str:
    """Why one that runs elsewhere leaves as soon as another is ready: that one's engine comes first. Empty when there is none."""
    if not draft.elsewhere(view):
        return ""
    ranks = {name: rank for rank, name in enumerate(spec.backends)}
    own = ranks.get(view.backend, len(ranks))
    others = (other for other in draft.instances(spec.name) if other.state not in LEAVING and not draft.leaves(other))
    better = next((other for other in others if ranks.get(other.backend, len(ranks)) < own), None)
    return f"{better.id} serves it on {better.backend}, which comes first" if better else ""


def retire_unloaded(draft: Draft, spec: ModelSpec) -> None:
    """Send away what an operator unloaded by hand."""
    for view in draft.instances(spec.name):
        if unloaded_by_hand(draft, view):
            draft.retire(view, StopReason.BY_HAND, "unloaded by hand")


def retire_stale(draft: Draft, stale: Sequence[InstanceView]) -> None:
    """Send away what a fresh instance replaces."""
    for view in stale:
        draft.retire(
            view, StopReason.REPLACED, worn(draft, view) or outranked(draft, draft.spec_of(view), view) or "its config changed"
        )


def is_known(draft: Draft, spec: ModelSpec, view: InstanceView) -> bool:
    """Whether it is known what a launch by its engine would be now: without that nothing can be said to be stale."""
    offers = draft.observed.candidates.get(spec.name, ())
    return any(offer.backend == view.backend and offer.fingerprint for offer in offers)


def retire_surplus(draft: Draft, want: Want, fresh: Sequence[InstanceView]) -> None:
    """Send away what is beyond the most that is allowed, and what is beyond the wanted number and idle."""
    if any(not is_known(draft, want.spec, view) for view in fresh):
        return  # one of them may be stale and about to be replaced by the other: wait until that is known
    asked = [next((view for view in fresh if view.backend == name), None) for name in sorted(draft.named(want.spec))]
    others = [view for view in fresh if view not in asked]
    by_worth = sorted(others, key=lambda v: (v.state is not InstanceState.READY, v.state in RESTING, -draft.leases(v), v.id))
    for view in by_worth[want.most :]:
        draft.retire(view, StopReason.UNWANTED, f"{want.most} wanted, {len(fresh)} there")
    for view in by_worth[want.count : want.most]:
        _retire_spare(draft, want, view)


def _retire_spare(draft: Draft, want: Want, view: InstanceView) -> None:
    if view.state is not InstanceState.READY or draft.leases(view) or want.spec.name in draft.demand.waiting:
        return
    limit = min(SPARE_IDLE, want.spec.idle_timeout or SPARE_IDLE)
    used = max(view.ready_at or view.since, view.since, draft.demand.idle_since.get(view.id, view.since))
    deadline = Instant(used + limit)
    if draft.now >= deadline:
        put_down(
            draft, view, StopReason.IDLE, f"a replica that was idle for {format_seconds(draft.now - used)}; {want.count} suffice"
        )
    else:
        draft.wake(deadline)


def _is_old(draft: Draft, spec: ModelSpec, view: InstanceView) -> bool:
    return _is_stale(draft, spec, view) or bool(worn(draft, view))


def _is_stale(draft: Draft, spec: ModelSpec, view: InstanceView) -> bool:
    """Launched from something else than the config now says. What is not known is not stale."""
    if view.backend not in spec.backends:
        return True
    offers = [c for c in draft.observed.candidates.get(spec.name, ()) if c.backend == view.backend]
    return any(offer.fingerprint and offer.fingerprint != view.fingerprint for offer in offers)
