"""Why an instance ended, weighed against what the kernel tells."""

from __future__ import annotations

import signal

import pytest

from offloadd.backends.base import default_exit
from offloadd.runtime.instances.evidence import Evidence, machine_oom_kills, weigh
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus
from offloadd.units import Bytes

SIGKILL = ExitStatus(signal=signal.SIGKILL)
KILLED = default_exit(SIGKILL, ["a line"], was_ready=True)


def test_its_own_group_says_that_the_kernel_killed_it() -> None:
    found = weigh(KILLED, SIGKILL, Evidence(oom_kills=1, peak=Bytes(3 * 2**30), machine_oom_kills=1))
    assert found.kind is ExitKind.OUT_OF_HOST_MEMORY
    assert "the kernel killed 1 process of it for want of memory, when its processes held up to 3.0 GiB" in found.message


def test_a_leader_that_ended_because_its_worker_was_killed() -> None:
    cause = ExitCause(kind=ExitKind.CRASHED, message="exit code 1")
    assert weigh(cause, ExitStatus(code=1), Evidence(oom_kills=2)).kind is ExitKind.OUT_OF_HOST_MEMORY


def test_a_kill_while_the_machine_was_short_of_memory_is_most_likely_the_kernels() -> None:
    found = weigh(KILLED, SIGKILL, Evidence(machine_oom_kills=2))
    assert found.kind is ExitKind.OUT_OF_HOST_MEMORY
    assert "most likely" in found.message
    assert "dmesg" in found.hint


def test_a_kill_while_memory_was_enough_was_somebodys() -> None:
    found = weigh(KILLED, SIGKILL, Evidence(machine_oom_kills=0))
    assert found.kind is ExitKind.KILLED
    assert found.hint.startswith("somebody sent it kill -9")


def test_where_the_kernel_tells_nothing_both_are_possible() -> None:
    assert weigh(KILLED, SIGKILL, Evidence()) == KILLED


@pytest.mark.parametrize("kind", sorted(set(ExitKind) - {ExitKind.KILLED, ExitKind.CRASHED}))
def test_a_cause_that_is_known_stays(kind: ExitKind) -> None:
    cause = ExitCause(kind=kind, message="known")
    assert weigh(cause, SIGKILL, Evidence(oom_kills=1, machine_oom_kills=1)) == cause


def test_other_peoples_trouble_is_not_the_cause_of_a_crash() -> None:
    cause = ExitCause(kind=ExitKind.CRASHED, message="exit code 1")
    assert weigh(cause, ExitStatus(code=1), Evidence(machine_oom_kills=3)) == cause


def test_this_machine_tells_how_many_it_killed() -> None:
    found = machine_oom_kills()
    assert found is None or found >= 0
