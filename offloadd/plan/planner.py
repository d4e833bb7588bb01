"""plan(): compare what is wanted with what is there, and say what to do now, why, and when to look again.

Order lives between plans, never inside one: memory is freed by one plan, seen to be free in a snapshot, and claimed by a later
plan. So any subset of a plan's actions, in any order, leaves a world that the next plans can finish.
"""

from __future__ import annotations

from offloadd.plan.draft import Draft
from offloadd.plan.loans import serve_loans
from offloadd.plan.sentences import resting
from offloadd.plan.settle import come_home, grow, let_go, settle
from offloadd.plan.upkeep import tend
from offloadd.plan.wants import wanted
from offloadd.plan.warm import likely_next
from offloadd.state.actions import Plan, StopReason
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec, Origin, RunMode
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import Instant


def plan(desired: DesiredState, observed: ObservedState, demand: Demand, *, now: Instant) -> Plan:
    """The next step from `observed` towards `desired` under `demand`, as of the monotonic instant `now`."""
    draft = Draft(desired, observed, demand, now)
    tend(draft)
    _retire_removed(draft)
    wants = [wanted(draft, spec) for spec in desired.models.values() if not _rests(draft, spec)]
    wants.sort(key=lambda want: want.rank)
    # First for all of them, so that nobody is evicted for memory that is on its way back anyway.
    for want in wants:
        let_go(draft, want)
    serve_loans(draft)
    for want in wants:
        settle(draft, want)
    for want in wants:
        grow(draft, want)
        come_home(draft, want)
    _adopt_orphans(draft)
    draft.warm = likely_next(draft)
    return draft.finish()


def _rests(draft: Draft, spec: ModelSpec) -> bool:
    """Whether nobody wants the model and nothing of it is there, as with most of them most of the time: that is its decision."""
    name = spec.name
    if spec.run is RunMode.ALWAYS or name in draft.demand.waiting or name in draft.demand.wishes or draft.instances(name):
        return False
    draft.decide(resting(name, spec.run))
    return True


def _retire_removed(draft: Draft) -> None:
    for view in draft.observed.instances.values():
        if view.model not in draft.desired.models:
            if draft.desired.closing:
                draft.retire(view, StopReason.SHUTDOWN, "offloadd is shutting down")
            else:
                found = view.spec.origin is Origin.DISCOVERED
                why = "its model is not on disk any more" if found else "the config no longer names its model"
                draft.retire(view, StopReason.UNWANTED, why)


def _adopt_orphans(draft: Draft) -> None:
    """Take over what an earlier daemon left running and nobody sends away: what is stale, too, serves until it is replaced."""
    for view in draft.observed.instances.values():
        if view.state is InstanceState.ORPHANED and not draft.acted_on(view):
            draft.adopt(view, "an earlier daemon left it running, and it is wanted")
