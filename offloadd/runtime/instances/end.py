"""Why one instance ended, and the record of it."""

from __future__ import annotations

from offloadd.backends.base import Backend
from offloadd.runtime.instances.evidence import Evidence, machine_oom_kills, weigh
from offloadd.runtime.instances.standing import Standing
from offloadd.runtime.launchers import Remains
from offloadd.state.actions import StopReason
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus
from offloadd.state.observed import ExitRecord
from offloadd.units import Seconds

_AT_FAULT = {StopReason.HUNG: ExitKind.HUNG, StopReason.START_TIMEOUT: ExitKind.START_TIMEOUT}
_KINDS = {**_AT_FAULT, StopReason.SLEEPLESS: ExitKind.SLEEPLESS}
"""It would have been stopped if it could not sleep at all: that it did not is no failure, and is remembered."""
_SLEEPLESS_HINT = "it is not put to sleep again before its config changes or it is loaded by hand; vllm.asleep and its log may tell"


def cause_of(standing: Standing, backend: Backend, status: ExitStatus, tail: tuple[str, ...], remains: Remains) -> ExitCause:
    """Ours when it was told to end, else its engine's adapter's word, weighed against what the kernel tells."""
    if standing.stop_reason is None:
        said = backend.explain_exit(status, tail, was_ready=standing.ready_at is not None)
        return weigh(said, status, _evidence(standing, remains))
    kind = _KINDS.get(standing.stop_reason, ExitKind.STOPPED)
    return ExitCause(kind=kind, message=standing.stop_why, hint=_SLEEPLESS_HINT if kind is ExitKind.SLEEPLESS else "")


def record_of(standing: Standing, status: ExitStatus, cause: ExitCause, tail: tuple[str, ...]) -> ExitRecord:
    """Mark it exited, and sum its life up."""
    now = standing.end()
    candidate = standing.action.candidate
    return ExitRecord(
        instance=standing.id,
        backend=candidate.backend,
        fingerprint=candidate.fingerprint,
        identity=candidate.facts.identity,
        at=now,
        status=status,
        cause=cause,
        expected=standing.stop_reason is not None and standing.stop_reason not in _AT_FAULT,
        ready_for=None if standing.ready_at is None else Seconds(now - standing.ready_at),
        tail=tail,
    )


def _evidence(standing: Standing, remains: Remains) -> Evidence:
    before, now = standing.oom_kills, machine_oom_kills()
    since = None if before is None or now is None else now - before
    return Evidence(oom_kills=remains.oom_kills, peak=remains.peak, machine_oom_kills=since)
