"""Bring one model to the number of instances that is wanted: retire, replace, start, or say why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from offloadd.plan.draft import Draft
from offloadd.plan.placement import place
from offloadd.plan.present import is_known, present, retire_stale, retire_surplus, retire_unloaded
from offloadd.plan.restart import RestartVerdict, next_restart, taught
from offloadd.plan.room import Short, for_model, make_room
from offloadd.plan.sentences import describe, give_up_sentence, short_sentence
from offloadd.plan.sleep import put_down
from offloadd.plan.waking import rouse, rouse_spare, sleepers
from offloadd.plan.wants import EVER, Want
from offloadd.state.actions import ModelState, StartInstance, StopInstance, StopReason
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName
from offloadd.state.launch import Candidate, Placement, VramEstimate
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView
from offloadd.units import Instant, Seconds, format_seconds

GROW_AFTER = Seconds(2)
"""A request that waits this long while every instance is busy shows that one more is needed."""
_HOPE = (ModelState.WAITING, ModelState.STARTING, ModelState.STOPPING, ModelState.BACKOFF, ModelState.FAILED)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a model's wish for instances that it does not have. Empty when it has them all."""

    state: ModelState | None = None
    sentence: str = ""
    hint: str = ""
    retry_at: Instant | None = None
    started: Sequence[StartInstance] = ()
    in_the_way: bool = False
    """Whether the model's own old instances must leave before a new one fits."""
    engines: dict[BackendName, str] = field(default_factory=dict)


def let_go(draft: Draft, want: Want) -> None:
    """Retire what the model does not need: all when none is wanted, those beyond the number, old ones that are replaced."""
    if not draft.instances(want.spec.name):
        return  # as with most of them, most of the time
    retire_unloaded(draft, want.spec)
    fresh, stale = present(draft, want.spec)
    if not want.count:
        for view in (*fresh, *stale):
            if want.end is StopReason.IDLE and view in fresh:
                put_down(draft, view, want.end, want.why)
            else:
                draft.retire(view, want.end, want.why)
        return
    retire_surplus(draft, want, fresh)
    ready = sum(view.state is InstanceState.READY and is_known(draft, want.spec, view) for view in fresh)
    if ready >= want.count:
        retire_stale(draft, stale)


def settle(draft: Draft, want: Want) -> None:
    """Start what the model lacks, and record its decision. Old instances serve on, unless a new one has no room beside them."""
    if not want.count:
        draft.decide(describe(draft, want, Outcome(state=ModelState.OFF, sentence=f"off: {want.why}")))
        return
    fresh, stale = present(draft, want.spec)
    roused = rouse(draft, want, fresh)
    there = [view for view in fresh if view not in roused.lost]
    asked = _start_named(draft, want, there, roused.lost)
    outcome = _start_missing(draft, want, want.count - len(there) - len(asked.started), roused.lost)
    if outcome.in_the_way:
        retire_stale(draft, stale)
    if outcome.in_the_way or outcome.started or asked.started:
        for view in roused.lost:
            draft.retire(view, StopReason.REPLACED, "it sleeps where it has no room to wake")
    if roused.waits and outcome.state is None:
        outcome.state, outcome.sentence = ModelState.WAITING, roused.waits
    outcome.started = [*asked.started, *outcome.started]
    if outcome.state is None:
        outcome.state, outcome.sentence = asked.state, asked.sentence
    outcome.engines.update(asked.engines)
    draft.decide(describe(draft, want, outcome))


def _start_named(draft: Draft, want: Want, there: Sequence[InstanceView], lost: Sequence[InstanceView]) -> Outcome:
    """One instance on each engine that waiting requests ask for by name, where none is there or on its way."""
    missing = draft.demand.waiting_for.get(want.spec.name, frozenset()) - {view.backend for view in there}
    outcome = Outcome()
    if not missing:
        return outcome
    offers = _startable(draft, want, Outcome())
    for name in sorted(missing):
        own = [offer for offer in offers if offer[0].backend == name]
        if own and (action := _start_one(draft, want, own, outcome, lost)):
            outcome.started = [*outcome.started, action]
    return outcome


def grow(draft: Draft, want: Want) -> None:
    """One more replica, where requests keep waiting although all that are wanted are there: in room that nobody else needs."""
    waiting = draft.demand.waiting.get(want.spec.name)
    if waiting is None or want.most <= want.count:
        return
    fresh, _ = present(draft, want.spec)
    asleep = sleepers(fresh)
    fresh = [view for view in fresh if view not in asleep]
    if not want.count <= len(fresh) < want.most or any(view.state is not InstanceState.READY for view in fresh):
        return
    at = Instant(waiting.oldest + GROW_AFTER)
    if draft.now < at:
        draft.wake(at)
        return
    if asleep:
        rouse_spare(draft, want, asleep[-1])
        return
    outcome = Outcome()
    for candidate, need in _startable(draft, want, outcome):
        answer = place(need, want.spec, draft.ledger.room, draft.site, candidate.gpus)
        if isinstance(answer, Placement):
            free = not draft.loads_there(answer) and draft.may_give(answer.reserved)
            outcome.started = [_give(draft, want, candidate, answer)] if free else []
            break
        outcome.sentence = answer.sentence
    draft.decide(describe(draft, want, outcome))


def come_home(draft: Draft, want: Want) -> None:
    """Where only servers elsewhere serve, start an engine that comes before theirs, as soon as it may and has room here.

    The others serve on until it is ready.
    """
    fresh, _ = present(draft, want.spec)
    if not want.count or not fresh or not all(draft.elsewhere(view) and view.state is InstanceState.READY for view in fresh):
        return
    before = want.spec.backends[
        : min(want.spec.backends.index(view.backend) for view in fresh if view.backend in want.spec.backends)
    ]
    for candidate, need in _startable(draft, want, Outcome()):
        answer = place(need, want.spec, draft.ledger.room, draft.site, candidate.gpus)
        if candidate.backend not in before or not isinstance(answer, Placement):
            continue
        if not draft.loads_there(answer) and draft.may_give(answer.reserved):
            _give(draft, want, candidate, answer)
            return


def _start_missing(draft: Draft, want: Want, missing: int, lost: Sequence[InstanceView]) -> Outcome:
    outcome = Outcome()
    if missing <= 0:
        return outcome
    offers = _startable(draft, want, outcome)
    if not offers:
        return outcome
    started: list[StartInstance] = []
    for _ in range(missing):
        action = _start_one(draft, want, offers, outcome, lost)
        if action is None:
            return outcome
        started.append(action)
    outcome.started = started
    return outcome


def _startable(draft: Draft, want: Want, outcome: Outcome) -> list[tuple[Candidate, VramEstimate]]:
    """Candidates that may be started now, best first; why the others may not goes into `outcome`."""
    found: list[tuple[Candidate, VramEstimate]] = []
    for candidate in draft.observed.candidates.get(want.spec.name, ()):
        if not candidate.problem and not candidate.fingerprint:
            _rule_out(outcome, candidate, ModelState.STARTING, "wanted: its files are being looked at")
            continue
        if candidate.problem or candidate.estimate is None:
            _rule_out(outcome, candidate, ModelState.FAILED, candidate.problem or "its memory need is not known", candidate.hint)
            continue
        ending = _ending_twin(draft, want.spec, candidate)
        verdict = _restart_verdict(draft, want.spec, candidate)
        if ending is not None:
            _rule_out(outcome, candidate, ModelState.STOPPING, f"starts again when {ending.id} has ended")
        elif verdict.gave_up:
            hint = verdict.last.cause.hint if verdict.last else ""
            _rule_out(outcome, candidate, ModelState.FAILED, give_up_sentence(verdict), hint)
        elif verdict.at > draft.now:
            draft.wake(verdict.at)
            _rule_out(outcome, candidate, ModelState.BACKOFF, _backoff_sentence(verdict, draft.now), retry_at=verdict.at)
        else:
            found.append(_taught(draft, want.spec, candidate, candidate.estimate))
    if not found and outcome.state is None:
        outcome.state, outcome.sentence = ModelState.STARTING, "wanted: its files and engines are being looked at"
    return found


def _ending_twin(draft: Draft, spec: ModelSpec, candidate: Candidate) -> InstanceView | None:
    """An instance of the same launch that is being stopped: how it ends decides whether and when to start the next."""
    for view in draft.instances(spec.name):
        stopping = view.state is InstanceState.STOPPING or isinstance(draft.action(view), StopInstance)
        if stopping and not view.stuck and view.fingerprint == candidate.fingerprint:
            return view
    return None


def _restart_verdict(draft: Draft, spec: ModelSpec, candidate: Candidate) -> RestartVerdict:
    return next_restart(spec.restart, _own_exits(draft, spec, candidate), now=draft.now)


def _own_exits(draft: Draft, spec: ModelSpec, candidate: Candidate) -> list[ExitRecord]:
    """Ends of the same launch of the same file, save those that an operator has forgiven."""
    forgiven = draft.demand.forgiven.get(spec.name, EVER)
    return [
        record
        for record in draft.observed.exits.get(spec.name, ())
        if record.fingerprint == candidate.fingerprint and record.identity == candidate.facts.identity and record.at > forgiven
    ]


def _taught(draft: Draft, spec: ModelSpec, candidate: Candidate, need: VramEstimate) -> tuple[Candidate, VramEstimate]:
    """The offer, with its need raised where such launches ran out of memory: what was too little is not tried again."""
    raised = taught(need, _own_exits(draft, spec, candidate))
    return (candidate, need) if raised is need else (replace(candidate, estimate=raised), raised)


def _backoff_sentence(verdict: RestartVerdict, now: Instant) -> str:
    cause = verdict.last.cause.message if verdict.last else "it failed"
    return f"{cause}; {verdict.failures} failures in a row, next start in {format_seconds(verdict.at - now)}"


def _rule_out(
    outcome: Outcome, candidate: Candidate, state: ModelState, sentence: str, hint: str = "", retry_at: Instant | None = None
) -> None:
    """Note why one engine cannot start the model. The most hopeful reason becomes the model's, the first of equals."""
    outcome.engines[candidate.backend] = sentence
    if outcome.state is None or _HOPE.index(state) < _HOPE.index(outcome.state):
        outcome.state, outcome.sentence, outcome.hint, outcome.retry_at = state, sentence, hint, retry_at


def _start_one(
    draft: Draft,
    want: Want,
    offers: Sequence[tuple[Candidate, VramEstimate]],
    outcome: Outcome,
    lost: Sequence[InstanceView] = (),
) -> StartInstance | None:
    """Start with the first engine that has room; else make room for the first that can have it; else say what is short.

    `lost` are the model's own that sleep where they cannot wake: they leave where that makes room.
    """
    shortages: list[Short] = []
    for candidate, need in offers:
        attempt = partial(place, need, want.spec, site=draft.site, usable=candidate.gpus)
        answer = attempt(draft.ledger.room)
        if isinstance(answer, Placement) and (ahead := draft.loads_there(answer)):
            draft.ledger.claim(answer.reserved)
            sentence = f"waits until {ahead} has loaded: an engine that measures its GPU must be alone on it meanwhile"
            _rule_out(outcome, candidate, ModelState.WAITING, sentence)
            return None
        if isinstance(answer, Placement):
            if draft.may_give(answer.reserved):
                return _give(draft, want, candidate, answer)
            outcome.state = ModelState.STARTING
            outcome.sentence = f"wanted: {draft.site.label(answer.gpus[0])} is read again before its memory is given"
            return None
        shortages.append(Short(answer, attempt))
        outcome.engines[candidate.backend] = answer.sentence
    _ask_for_room(draft, want, shortages, outcome, lost)
    return None


def _give(draft: Draft, want: Want, candidate: Candidate, placement: Placement) -> StartInstance:
    key = draft.next_id(want.spec.name)
    if candidate.estimate is not None and candidate.estimate.asleep is not None:
        asleep = {gpu: min(candidate.estimate.asleep, placement.reserved[gpu]) for gpu in placement.gpus}
        placement = replace(placement, asleep=asleep)
    action = StartInstance(instance=key, spec=want.spec, candidate=candidate, placement=placement, why=want.why)
    draft.start(action)
    return action


def _ask_for_room(draft: Draft, want: Want, shortages: Sequence[Short], outcome: Outcome, lost: Sequence[InstanceView]) -> None:
    possible = [short for short in shortages if not short.answer.never]
    if not possible:
        if outcome.state is None:
            outcome.state, outcome.sentence = ModelState.FAILED, shortages[0].answer.sentence
            outcome.hint = "raise the budget, or lower context, parallel or the model's size"
        return
    own = [*present(draft, want.spec)[1], *lost]
    making = make_room(draft, for_model(draft, want), possible, own)
    outcome.state, outcome.retry_at, outcome.in_the_way = ModelState.WAITING, None, making.own_leave
    outcome.sentence = short_sentence(draft, making, own)
