"""Instances that need something whatever the config says: the dead, the drained, the late and the silent."""

from __future__ import annotations

from offloadd.plan.draft import Draft, requests_run
from offloadd.plan.sleep import tend_falling, tend_waking
from offloadd.state.actions import StopReason
from offloadd.state.ids import HOST_RAM
from offloadd.state.observed import SETTLING, InstanceState, InstanceView
from offloadd.units import Instant, Seconds, format_bytes, format_seconds

IDLE_SILENCE = Seconds(30)
"""An idle instance whose working loop has not answered for this long is hung."""
RELEASE_TIME = Seconds(10)
"""How long an ended instance's memory may take to be shown as free."""
BUSY_SILENCE = Seconds(300)
"""One with requests may be silent for longer: a long prompt on a slow machine holds the loop for minutes."""


WORN_AFTER = Seconds(60)
"""Nothing is replaced for its size before it was ready for so long: a ceiling too low even for a fresh one is no treadmill."""


def tend(draft: Draft) -> None:
    """Forget, stop or watch every instance that needs it."""
    for view in draft.observed.instances.values():
        if view.state is InstanceState.EXITED:
            _await_release(draft, view)
        elif view.state is InstanceState.DRAINING:
            _finish_drain(draft, view)
        elif view.state in SETTLING:
            _check_start(draft, view)
        elif view.state is InstanceState.FALLING_ASLEEP:
            tend_falling(draft, view)
        elif view.state is InstanceState.WAKING:
            tend_waking(draft, view)
        elif view.state in (InstanceState.READY, InstanceState.SLEEPING):
            _check_signs(draft, view)


def _await_release(draft: Draft, view: InstanceView) -> None:
    """Keep its promise on the books until the devices show the memory free, or until it is plain that they will not.

    What is still missing then counts as somebody else's: it lowers what is free, and so is not promised again either.
    """
    deadline = Instant(view.since + RELEASE_TIME)
    if not any(view.unreleased.values()) or draft.now >= deadline:
        draft.forget(view)
    else:
        draft.wake(deadline)


def _finish_drain(draft: Draft, view: InstanceView) -> None:
    held = draft.leases(view)
    deadline = view.drain_deadline if view.drain_deadline is not None else draft.now
    if not held:
        draft.stop(view, StopReason.UNWANTED, "drained: no request runs any more")
    elif draft.now >= deadline:
        draft.stop(view, StopReason.UNWANTED, f"{requests_run(held)} still, at the drain deadline")
    else:
        draft.wake(deadline)


def _check_start(draft: Draft, view: InstanceView) -> None:
    limit = draft.spec_of(view).start_timeout
    deadline = Instant(view.begun_at + limit)
    if draft.now >= deadline:
        draft.stop(view, StopReason.START_TIMEOUT, f"not ready {format_seconds(limit)} after its start (start_timeout)")
    else:
        draft.wake(deadline)


def _check_signs(draft: Draft, view: InstanceView) -> None:
    held = draft.leases(view)
    if view.fault and not held:
        draft.stop(view, StopReason.HUNG, view.fault)
        return
    limit = BUSY_SILENCE if held else IDLE_SILENCE
    last = max(view.last_sign or view.since, view.since)
    if not held:
        # The client of a long prompt may have just gone away: silence counts as idle only from then on.
        last = max(last, draft.last_used(view))
    deadline = Instant(last + limit)
    if draft.now >= deadline:
        state = f"while {requests_run(held)}" if held else "while idle"
        draft.stop(view, StopReason.HUNG, f"no sign of life for {format_seconds(draft.now - last)} {state}")
    else:
        draft.wake(deadline)


def worn(draft: Draft, view: InstanceView) -> str:
    """Why an instance that works should be replaced by a fresh one all the same; empty when there is no reason.

    It then serves on until the fresh one is ready, or leaves at a request boundary where memory does not allow both.
    """
    limit = draft.spec_of(view).health.rss_limit
    held = view.measured.get(HOST_RAM, 0)
    if not limit or held <= limit or view.ready_at is None:
        return ""
    proven = Instant(view.ready_at + WORN_AFTER)
    if draft.now < proven:
        draft.wake(proven)
        return ""
    return f"it has grown to {format_bytes(held)} of RAM, its ceiling is {format_bytes(limit)} (health.rss_limit)"
