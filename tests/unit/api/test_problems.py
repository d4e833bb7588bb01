"""What an operator is told of instances that cannot do their work."""

from __future__ import annotations

import pytest

from offloadd.api.problems import of_processes
from offloadd.state.observed import InstanceState, ObservedState
from tests.unit.plan.build import view

SICK = "it cannot be put to sleep: status 500"


def told(state: InstanceState) -> list[str]:
    sick = view("a-1", 4, state, fault=SICK)
    return [what for what, _ in of_processes(ObservedState(instances={sick.id: sick}))]


@pytest.mark.parametrize("state", [InstanceState.READY, InstanceState.FALLING_ASLEEP, InstanceState.STOPPING])
def test_a_fault_is_told_until_its_end(state: InstanceState) -> None:
    assert told(state) == [f"a-1: {SICK}"]


def test_one_that_has_ended_is_not_about_to_be_replaced() -> None:
    """It is on the books until its memory is seen to be free, which may be ten seconds later."""
    assert told(InstanceState.EXITED) == []
