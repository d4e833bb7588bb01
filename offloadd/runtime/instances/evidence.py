"""What the kernel tells of an instance's end beside its exit status: was it killed for want of memory, and by whose word?"""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from offloadd.state.launch import ExitCause, ExitKind, ExitStatus
from offloadd.units import Bytes, counted, format_bytes

_VMSTAT = Path("/proc/vmstat")
_DOUBTFUL = frozenset({ExitKind.KILLED, ExitKind.CRASHED})
"""Causes that say how it ended and not why."""
_LESS = "lower context or parallel, load fewer models at once (budget.host.limit), or give the machine more memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen at the end of one instance."""

    oom_kills: int = 0
    """Of its own processes, by the books of its control group."""
    peak: Bytes | None = None
    """The most that the group ever held."""
    machine_oom_kills: int | None = None
    """Of any process of the machine since shortly before the end; None where the kernel does not tell."""


def weigh(cause: ExitCause, status: ExitStatus, seen: Evidence) -> ExitCause:
    """The cause, corrected by what was seen. Its own control group's word is proof; the machine's is only a hint."""
    if cause.kind not in _DOUBTFUL or cause.permanent:
        return cause
    if seen.oom_kills:
        held = f", when its processes held up to {format_bytes(seen.peak)}" if seen.peak else ""
        message = f"the kernel killed {counted(seen.oom_kills, 'process of it', 'processes of it')} for want of memory{held}"
        return ExitCause(kind=ExitKind.OUT_OF_HOST_MEMORY, message=message, hint=_LESS)
    if status.signal != signal.SIGKILL:
        return cause
    if seen.machine_oom_kills:
        killed = counted(seen.machine_oom_kills, "process", "processes")
        message = f"{cause.message}; the kernel killed {killed} for want of memory at that time, this one most likely"
        return ExitCause(kind=ExitKind.OUT_OF_HOST_MEMORY, message=message, hint=f"{_LESS}; dmesg names what was killed")
    if seen.machine_oom_kills is not None:
        return replace(cause, hint="somebody sent it kill -9: the kernel has killed nothing for want of memory at that time")
    return cause


def machine_oom_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since the machine's start; None where it does not tell."""
    try:
        for line in _VMSTAT.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    except (OSError, ValueError):
        return None
    return None
