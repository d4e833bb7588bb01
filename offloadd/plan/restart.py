"""When to start again after a failure, and when to stop trying."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from offloadd.state.desired import RestartPolicy
from offloadd.state.launch import ExitKind, VramEstimate
from offloadd.state.observed import ExitRecord
from offloadd.units import Bytes, Instant, Seconds

WELL = Seconds(600)
"""An instance that was ready for this long has proven itself: failures before it no longer count."""
PORT_TRIES = 3
"""Lost races for a port that are retried at once and not counted."""
_JITTER = 0.25
RAISE = 1.15
"""How much more is asked for after each launch that ran out of memory with what it had been given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartVerdict:
    """Start at `at` or later; never, when `gave_up`. `failures` counts those in a row, `last` is the latest."""

    at: Instant
    failures: int = 0
    gave_up: bool = False
    last: ExitRecord | None = None


def next_restart(policy: RestartPolicy, exits: Sequence[ExitRecord], *, now: Instant) -> RestartVerdict:
    """Judge the exits of one launch (same fingerprint, same file), oldest first.

    The first failure is retried at once; then the wait doubles from `backoff` up to `max_backoff`, spread by a quarter either way.
    A failure that would repeat itself ends trying at once, others after `give_up_after` in a row.
    """
    failures = _failures_in_a_row(exits)
    if not failures:
        return RestartVerdict(at=now)
    # A replica that fails later for a passing reason does not undo what the permanent failure told.
    last = next((record for record in reversed(failures) if record.cause.permanent), failures[-1])
    counted = _without_port_races(failures)
    if last.cause.permanent or len(counted) >= policy.give_up_after:
        return RestartVerdict(at=now, failures=len(counted), gave_up=True, last=last)
    return RestartVerdict(at=Instant(last.at + _delay(policy, len(counted), last)), failures=len(counted), last=last)


def taught(need: VramEstimate, exits: Sequence[ExitRecord]) -> VramEstimate:
    """The need, raised for each of these ends that was for want of memory since an instance last proved itself.

    What placement makes of it is then the ordinary thing: others leave for it, a larger device takes it, with `partial` fewer
    layers go onto the GPU, or it is refused with the arithmetic.
    """
    on_gpu = on_host = 0
    for record in exits:
        if record.cause.kind is ExitKind.OUT_OF_MEMORY:
            on_gpu += 1
        elif record.cause.kind is ExitKind.OUT_OF_HOST_MEMORY:
            on_host += 1
        elif record.ready_for is not None and record.ready_for >= WELL:
            on_gpu = on_host = 0
    if on_gpu:
        need = _raised(need, RAISE**on_gpu)
    return _raised_on_host(need, RAISE**on_host) if on_host else need


def _raised(need: VramEstimate, factor: float) -> VramEstimate:
    layers = tuple(Bytes(int(size * factor)) for size in need.layers)
    total = Bytes(int(need.total * factor))
    fixed = Bytes(total - sum(layers)) if layers else need.fixed
    basis = f"{need.basis}, raised by {factor - 1:.0%} since it ran out of memory"
    # An engine on the CPU may say it in the same words.
    on_host = Bytes(int((need.total if need.on_host is None else need.on_host) * factor))
    return replace(need, total=total, layers=layers, fixed=fixed, on_host=on_host, basis=basis)


def _raised_on_host(need: VramEstimate, factor: float) -> VramEstimate:
    on_host = need.total if need.on_host is None else need.on_host
    basis = f"{need.basis}, raised by {factor - 1:.0%} since it ran out of RAM"
    return replace(need, host=Bytes(int(need.host * factor)), on_host=Bytes(int(on_host * factor)), basis=basis)


def _failures_in_a_row(exits: Sequence[ExitRecord]) -> list[ExitRecord]:
    row: list[ExitRecord] = []
    for record in exits:
        if record.ready_for is not None and (record.expected or record.ready_for >= WELL):
            row.clear()
        if not record.expected:
            row.append(record)
    return row


def _without_port_races(failures: Sequence[ExitRecord]) -> list[ExitRecord]:
    races = [record for record in failures if record.cause.kind is ExitKind.PORT_TAKEN]
    return [record for record in failures if record not in races] if len(races) < PORT_TRIES else list(failures)


def _delay(policy: RestartPolicy, failures: int, last: ExitRecord) -> Seconds:
    if failures <= 1:
        return Seconds(0)
    plain = min(policy.max_backoff, policy.backoff * 2.0 ** min(failures - 2, 60))
    return Seconds(plain * (1 + _JITTER * _spread(str(last.instance))))


def _spread(seed: str) -> float:
    """A number in -1..1 that is the same for the same instance: jitter without chance."""
    digest = hashlib.sha256(seed.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**31 - 1
