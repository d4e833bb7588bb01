"""What decisions say: one sentence per model, with the numbers that decided."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offloadd.plan.draft import Draft, requests_run
from offloadd.plan.eviction import Evictable
from offloadd.plan.restart import RestartVerdict
from offloadd.plan.room import Making
from offloadd.plan.wants import Want
from offloadd.state.actions import Decision, ModelState, SleepInstance, StartInstance, StopInstance, WakeInstance
from offloadd.state.desired import RunMode
from offloadd.state.ids import ModelName
from offloadd.state.observed import RESTING, SETTLING, InstanceState, InstanceView
from offloadd.units import Instant, Seconds, format_bytes, format_seconds

if TYPE_CHECKING:
    from offloadd.plan.settle import Outcome

_UNDER_WAY = (ModelState.WAITING, ModelState.STARTING, ModelState.LOADING, ModelState.STOPPING, ModelState.BACKOFF)
_BY_INSTANCE = {
    InstanceState.READY: ModelState.READY,
    InstanceState.WAKING: ModelState.WAKING,
    InstanceState.LOADING: ModelState.LOADING,
    InstanceState.STARTING: ModelState.STARTING,
    InstanceState.ORPHANED: ModelState.STARTING,
    InstanceState.FALLING_ASLEEP: ModelState.SLEEPING,
    InstanceState.SLEEPING: ModelState.SLEEPING,
}
_RANK = {state: rank for rank, state in enumerate(_BY_INSTANCE)}


def describe(draft: Draft, want: Want, outcome: Outcome) -> Decision:
    """The model's decision: what its best instance does, else what came of the wish for one."""
    best = _best(draft, draft.instances(want.spec.name))
    if best is not None and (best.state in RESTING or isinstance(draft.action(best), SleepInstance)):
        return _resting(draft, want, outcome, best)
    if best is not None:
        return _decision(draft, want, outcome, _BY_INSTANCE[best.state], _instance_sentence(draft, best, outcome))
    if outcome.started:
        return _decision(draft, want, outcome, ModelState.STARTING, _start_sentence(outcome.started[0], want))
    if outcome.state not in (None, ModelState.OFF):
        return _decision(draft, want, outcome, outcome.state or ModelState.OFF, outcome.sentence)
    return _leaving(draft, want, outcome)


def _resting(draft: Draft, want: Want, outcome: Outcome, view: InstanceView) -> Decision:
    """Of one that sleeps: what it holds and what it needs to wake, and what is being done about that."""
    action = draft.action(view)
    if isinstance(action, WakeInstance):
        text = f"{view.id} wakes on {view.backend} and takes {format_bytes(_less(view))} again: {want.why}"
        return _decision(draft, want, outcome, ModelState.WAKING, text)
    if isinstance(action, SleepInstance):
        freed = format_bytes(sum(view.placement.freed_asleep.values()))
        text = f"{view.id} is put to sleep on {view.backend}, to free {freed}: {action.why}"
    elif view.state is InstanceState.FALLING_ASLEEP:
        freed = format_bytes(sum(view.placement.freed_asleep.values()))
        text = f"{view.id} falls asleep on {view.backend}, which is to free {freed}: {want.why}"
    else:
        held, need = format_bytes(view.placement.total), format_bytes(_less(view))
        text = f"{view.id} sleeps on {view.backend} with {held}, and needs {need} more to wake"
        if outcome.started:
            started = _start_sentence(outcome.started[0], want)
            return _decision(draft, want, outcome, ModelState.STARTING, f"{started}; {text}, which is not there")
        if outcome.state not in (None, ModelState.OFF):
            return _decision(draft, want, outcome, outcome.state or ModelState.OFF, f"{outcome.sentence}; {text}")
        text += f": {want.why}"
    return _decision(draft, want, outcome, ModelState.SLEEPING, text)


def _less(view: InstanceView) -> int:
    """Bytes that it is promised less than awake."""
    return (view.awake or view.placement).total - view.placement.total


@functools.lru_cache(maxsize=10_000)
def resting(model: ModelName, run: RunMode) -> Decision:
    """The decision about a model that nobody wants and of which nothing is there: the same object each time it is asked for."""
    why = "run: never" if run is RunMode.NEVER else "no request wants it"
    return Decision(model=model, state=ModelState.OFF, sentence=f"off: {why}")


def _best(draft: Draft, views: Sequence[InstanceView]) -> InstanceView | None:
    """The instance that speaks for the model: of the state that is nearest to use, the latest."""
    speaking = [view for view in views if view.state in _RANK and not isinstance(draft.action(view), StopInstance)]
    return min(speaking, key=lambda view: (_RANK[view.state], -view.id.number), default=None)


def _start_sentence(action: StartInstance, want: Want) -> str:
    need = action.candidate.estimate
    room = format_bytes(action.placement.total)
    if need is not None and ", raised by " in need.basis:
        room += " (it ran out of memory with less)"
    return f"starts as {action.instance} on {action.candidate.backend} with {room}: {want.why}"


def _decision(draft: Draft, want: Want, outcome: Outcome, state: ModelState, sentence: str) -> Decision:
    wish = draft.demand.wishes.get(want.spec.name)
    if wish is not None and " by hand" not in sentence:
        sentence += f"; {'loaded' if wish.load else 'unloaded'} by hand {format_seconds(draft.now - wish.since)} ago"
    return Decision(
        model=want.spec.name,
        state=state,
        sentence=sentence,
        hint=outcome.hint,
        retry_at=outcome.retry_at,
        wish=wish,
        ready_in=_ready_in(draft, want, state, outcome.retry_at),
        engines=dict(outcome.engines),
    )


def _ready_in(draft: Draft, want: Want, state: ModelState, retry_at: Instant | None) -> Seconds | None:
    """How long until it is ready: what is left of a load, or of a backoff and a whole load, by the last load."""
    load = draft.observed.load_times.get(want.spec.name)
    if load is None or state not in _UNDER_WAY:
        return None
    begun = [view.begun_at for view in draft.instances(want.spec.name) if view.state in SETTLING]
    passed = draft.now - min(begun) if begun else 0.0
    pause = retry_at - draft.now if retry_at is not None else 0.0
    return Seconds(max(0.0, pause) + max(0.0, load - passed))


def _instance_sentence(draft: Draft, view: InstanceView, outcome: Outcome) -> str:
    held = draft.leases(view)
    text = f"{view.id} is {view.state} on {view.backend} with {format_bytes(view.placement.total)}"
    if held:
        text += f", {requests_run(held)}"
    if outcome.started:
        text += f"; {outcome.started[0].instance} starts beside it"
    elif outcome.sentence:
        text += f"; another cannot start: {outcome.sentence}"
    return text


def _leaving(draft: Draft, want: Want, outcome: Outcome) -> Decision:
    views = draft.instances(want.spec.name)
    for seen, state in ((InstanceState.DRAINING, ModelState.DRAINING), (InstanceState.STOPPING, ModelState.STOPPING)):
        view = next((view for view in views if view.state is seen), None)
        if view is not None:
            return _decision(draft, want, outcome, state, f"{view.id} is {view.state}; {want.why}")
    stopped = next((view for view in views if isinstance(draft.action(view), StopInstance)), None)
    if stopped is not None:
        return _decision(draft, want, outcome, ModelState.STOPPING, f"{stopped.id} is being stopped; {want.why}")
    return _decision(draft, want, outcome, ModelState.OFF, outcome.sentence or f"off: {want.why}")


def give_up_sentence(verdict: RestartVerdict) -> str:
    """Why a candidate is not tried again, from its last end."""
    if verdict.last is None:
        return "given up"
    cause = verdict.last.cause.message
    if verdict.last.cause.permanent:
        return cause
    return (
        f"{cause}; given up after {verdict.failures} failures in a row, until its config or file changes, or it is loaded by hand"
    )


def short_sentence(draft: Draft, making: Making, own: Sequence[InstanceView] = ()) -> str:
    """Why somebody waits for memory, and what is being done about it: who makes room, `own` old instances among them."""
    answer = making.short.answer
    text = f"waits: {answer.sentence}"
    if answer.device is None:
        return text
    named = [f"{view.id} (its config changed)" for view in own if making.own_leave]
    named += [f"{v.view.id} ({_use(draft, v)})" for v in making.victims if not _sleeps(draft, v)]
    asleep = [f"{v.view.id} ({_use(draft, v)})" for v in making.victims if _sleeps(draft, v)]
    if named:
        text += f"; making room with {', '.join(named)}"
    if asleep:
        text += f"; putting {', '.join(asleep)} to sleep"
    if named or asleep:
        return text
    if making.coming:
        return f"{text}, {format_bytes(draft.leaving(answer.device))} being released"
    if making.late:
        return f"{text}, and memory of what just ended may be on its way back"
    return f"{text}, and nothing may be evicted for it now"


def _sleeps(draft: Draft, victim: Evictable) -> bool:
    return isinstance(draft.action(victim.view), SleepInstance)


def _use(draft: Draft, victim: Evictable) -> str:
    return requests_run(draft.leases(victim.view)) if victim.busy else f"idle {format_seconds(draft.now - victim.last_used)}"
