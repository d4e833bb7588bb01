"""The tier between ready and stopped: who is put to sleep, and whether the memory that this was for has really come back."""

from __future__ import annotations

from collections.abc import Mapping

from offloadd.plan.draft import Draft
from offloadd.state.actions import StopReason
from offloadd.state.ids import DeviceId
from offloadd.state.launch import ExitKind
from offloadd.state.observed import RESTING, InstanceState, InstanceView
from offloadd.units import Bytes, Instant, Seconds, format_bytes, format_seconds

FALLS_WITHIN = Seconds(60)
"""An engine may take so long to fall asleep: weights are copied to RAM, or work that nobody waits for is ended first."""
FREED_WITHIN = Seconds(10)
"""How long the memory of one that says that it sleeps may take to be shown as free."""
FREED = 0.75
"""The part of what it was to give back that must be seen to be free."""


def may_sleep(draft: Draft, view: InstanceView) -> bool:
    """Whether it can be put to sleep now: it is idle and well, and no such launch has kept its memory asleep before."""
    idle = view.state is InstanceState.READY and not draft.leases(view) and not view.ejected
    return idle and any(view.placement.freed_asleep.values()) and not _sleepless(draft, view)


def put_down(draft: Draft, view: InstanceView, reason: StopReason, why: str) -> None:
    """Have one that is idle sleep where it can, and leave where it cannot. One that sleeps sleeps on, one that wakes first does."""
    if view.state in RESTING or view.state is InstanceState.WAKING or draft.acted_on(view):
        return
    if not may_sleep(draft, view):
        draft.retire(view, reason, why)
    elif draft.loads_there(view.placement, sizes_itself=False) is None:  # else it is put down when that one has loaded
        draft.put_to_sleep(view, why)


def tend_falling(draft: Draft, view: InstanceView) -> None:
    """Wait for its word, then for the devices': only what they show to be free is taken off its promise."""
    if view.fault:
        draft.stop(view, StopReason.SLEEPLESS, view.fault)
    elif view.slept_at is None:
        deadline = Instant(view.since + FALLS_WITHIN)
        if draft.now >= deadline:
            draft.stop(view, StopReason.SLEEPLESS, f"it has not fallen asleep in {format_seconds(FALLS_WITHIN)}")
        else:
            draft.wake(deadline)
    else:
        _await_memory(draft, view, view.slept_at)


def tend_waking(draft: Draft, view: InstanceView) -> None:
    """One that does not wake in time, or cannot, makes way for a fresh start."""
    limit = draft.spec_of(view).start_timeout
    deadline = Instant(view.since + limit)
    if view.fault:
        draft.stop(view, StopReason.HUNG, view.fault)
    elif draft.now >= deadline:
        draft.stop(view, StopReason.START_TIMEOUT, f"not awake {format_seconds(limit)} after it was told to wake (start_timeout)")
    else:
        draft.wake(deadline)


def held_asleep(draft: Draft, view: InstanceView, since: Instant) -> Mapping[DeviceId, Bytes] | None:
    """What it holds of each GPU by readings from `since` or later; None when one of them has no such reading.

    Where the driver does not tell what each process holds, what has come free since it was told to sleep must tell.
    """
    held: dict[DeviceId, Bytes] = {}
    for gpu in view.placement.asleep:
        device = draft.observed.devices.get(gpu)
        if device is None or (device.read_at is not None and device.read_at < since):
            return None
        promised = view.placement.reserved[gpu]
        freed = device.free - view.free_before.get(gpu, device.free)
        held[gpu] = view.measured.get(gpu, Bytes(max(0, promised - freed)))
    return held


def _await_memory(draft: Draft, view: InstanceView, slept_at: Instant) -> None:
    held = held_asleep(draft, view, slept_at)
    deadline = Instant(slept_at + FREED_WITHIN)
    if held is not None and all(_has_freed(view, gpu, size) for gpu, size in held.items()):
        keeps = {gpu: Bytes(max(view.placement.asleep[gpu], size)) for gpu, size in held.items()}
        freed = sum(view.placement.reserved[gpu] - size for gpu, size in keeps.items())
        draft.rest(view, keeps, f"{format_bytes(freed)} came free, {format_bytes(sum(keeps.values()))} stay promised to it")
    elif draft.now < deadline:
        draft.wake(deadline)
    elif late := held_asleep(draft, view, deadline):  # judged on a reading from after the time that it had, never without one
        full = sum(view.placement.reserved[gpu] for gpu in late)
        found = f"it says that it sleeps, and holds {format_bytes(sum(late.values()))} of {format_bytes(full)} GPU memory"
        draft.stop(view, StopReason.SLEEPLESS, f"{found} {format_seconds(FREED_WITHIN)} later")


def _has_freed(view: InstanceView, gpu: DeviceId, held: Bytes) -> bool:
    promised = view.placement.reserved[gpu]
    return promised - held >= FREED * view.placement.freed_asleep[gpu]


def _sleepless(draft: Draft, view: InstanceView) -> bool:
    forgiven = draft.demand.forgiven.get(view.model, Instant(float("-inf")))
    return any(
        record.cause.kind is ExitKind.SLEEPLESS and record.fingerprint == view.fingerprint and record.at > forgiven
        for record in draft.observed.exits.get(view.model, ())
    )
