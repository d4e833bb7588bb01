"""When to start again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from offloadd.plan.restart import PORT_TRIES, next_restart
from offloadd.state.desired import RestartPolicy
from offloadd.state.launch import ExitKind
from offloadd.state.observed import ExitRecord
from offloadd.units import Seconds
from tests.unit.plan.build import BAD_FILE, NOW, ended

POLICY = RestartPolicy(backoff=Seconds(1), max_backoff=Seconds(60), give_up_after=10)


def crashes(count: int) -> list[ExitRecord]:
    return [ended(f"a-{number}", ago=0) for number in range(1, count + 1)]


def delay(*records: ExitRecord) -> float:
    verdict = next_restart(POLICY, records, now=NOW)
    assert not verdict.gave_up
    return verdict.at - NOW


def test_without_failures_it_starts_now() -> None:
    assert delay() == 0


def test_the_first_failure_is_retried_at_once() -> None:
    assert delay(*crashes(1)) == 0


@pytest.mark.parametrize(("failures", "plain"), [(2, 1), (3, 2), (4, 4), (5, 8), (8, 60), (9, 60)])
def test_then_the_wait_doubles_up_to_its_cap_within_a_quarter(failures: int, plain: float) -> None:
    assert 0.75 * plain <= delay(*crashes(failures)) <= 1.25 * plain


def test_the_jitter_differs_between_instances_and_repeats_for_the_same() -> None:
    waits = [delay(ended("a-1", 0), ended(f"a-{number}", 0)) for number in range(2, 12)]
    assert all(one != other for one, other in pairwise(waits))
    assert waits == [delay(ended("a-1", 0), ended(f"a-{number}", 0)) for number in range(2, 12)]


def test_after_ten_failures_in_a_row_it_gives_up() -> None:
    verdict = next_restart(POLICY, crashes(10), now=NOW)
    assert (verdict.gave_up, verdict.failures) == (True, 10)


def test_a_failure_that_would_repeat_itself_ends_trying_at_once() -> None:
    assert next_restart(POLICY, [ended("a-1", 0, cause=BAD_FILE)], now=NOW).gave_up


def test_a_passing_failure_of_another_replica_does_not_undo_a_permanent_one() -> None:
    verdict = next_restart(POLICY, [ended("a-1", 5, cause=BAD_FILE), ended("a-2", 1)], now=NOW)
    assert verdict.gave_up
    assert verdict.last is not None
    assert verdict.last.cause == BAD_FILE


def test_ten_good_minutes_make_good_for_failures_before() -> None:
    assert delay(*crashes(5), ended("a-6", 0, ready_for=Seconds(600))) == 0
    assert delay(*crashes(5), ended("a-6", 0, ready_for=Seconds(599))) > 0


def test_an_ordered_end_of_a_ready_instance_makes_good_for_failures_before() -> None:
    assert delay(*crashes(5), ended("a-6", 0, ExitKind.STOPPED, expected=True, ready_for=Seconds(1))) == 0


def test_an_ordered_end_before_it_was_ready_proves_nothing() -> None:
    assert delay(*crashes(5), ended("a-6", 0, ExitKind.STOPPED, expected=True)) == delay(*crashes(5))


def test_two_lost_races_for_a_port_do_not_count_and_a_third_does() -> None:
    races = [ended(f"a-{number}", 0, ExitKind.PORT_TAKEN) for number in range(1, PORT_TRIES + 1)]
    assert delay(*races[:2]) == 0
    assert delay(*races) > 0
