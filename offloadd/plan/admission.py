"""Grant, queue or refuse one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from offloadd.plan.balance import Seat, beyond, pick
from offloadd.state.actions import Decision, ModelState
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.ids import InstanceId
from offloadd.state.observed import Signal
from offloadd.units import Instant, Seconds, counted, format_seconds

PATIENCE = Seconds(5)
"""A backoff up to this long is waited out in the queue; a longer one refuses at once and says when to come back."""
FULL_RETRY = Seconds(5)
"""When to come back, where it is not known how long a load takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Send it to this instance."""

    instance: InstanceId
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Let it wait; something that is under way can let it in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Answer with this status now. `retry_after` is given when waiting helps."""

    status: int
    code: str
    message: str
    retry_after: Seconds | None = None


def admit(
    spec: ModelSpec,
    decision: Decision | None,
    seats: Sequence[Seat],
    waiting: int,
    *,
    now: Instant,
    known: InstanceId | None = None,
) -> Granted | Queued | Refused:
    """Decide about the request next in line; `waiting` counts those before it in the queue, `known` has its conversation cached."""
    best = None if waiting else pick(seats, now=now, known=known)
    if best is not None:
        why = _why(best.instance, best.leases, best.slots, beyond(best.signal, now=now), best.instance == known)
        return Granted(instance=best.instance, why=why)
    refusal = None if seats else hopeless(spec, decision, now=now)
    if refusal:
        return refusal
    if waiting >= spec.queue.max_waiting:
        message = f"{spec.name} has {waiting} requests waiting, which is its limit (queue.max_waiting)"
        return Refused(status=429, code="queue_full", message=message, retry_after=retry_after(None if seats else decision))
    return Queued()


def admit_sole(instance: InstanceId, leases: int, slots: int, heard: Signal | None, *, now: Instant) -> str | None:
    """As `admit` of the next in line for a model's only instance, which has not failed lately: why it is granted, else None."""
    if leases >= slots:
        return None
    return _why(instance, leases, slots, 0 if heard is None else beyond(heard, now=now), False)


@lru_cache(maxsize=1024)  # there are few such sentences, and many requests
def _why(instance: InstanceId, leases: int, slots: int, others: int, familiar: bool) -> str:
    more = f", {counted(others, 'request', 'requests')} of others beside" if others else ""
    known = " and knows the conversation" if familiar else ""
    return f"{instance} is ready with {leases} of {slots} slots busy{more}{known}"


def retry_after(decision: Decision | None) -> Seconds:
    """When to come back: when the model is ready, by how long its last load took."""
    return FULL_RETRY if decision is None or decision.ready_in is None else max(Seconds(1), decision.ready_in)


def hopeless(spec: ModelSpec, decision: Decision | None, *, now: Instant) -> Refused | None:
    """Why waiting for a model that has no ready instance is in vain, if it is."""
    if spec.run is RunMode.NEVER and not (decision and decision.wish and decision.wish.load):
        return Refused(status=409, code="model_disabled", message=f"{spec.name} is configured with run: never")
    if decision is None:
        return None
    if decision.state is ModelState.FAILED:
        return Refused(status=503, code="model_failed", message=f"{spec.name} cannot be served: {decision.sentence}")
    if decision.state is ModelState.BACKOFF and decision.retry_at is not None:
        wait = Seconds(decision.retry_at - now)
        if wait > PATIENCE:
            message = f"{spec.name} keeps failing: {decision.sentence}; next try in {format_seconds(wait)}"
            return Refused(status=503, code="model_backing_off", message=message, retry_after=wait)
    return None
