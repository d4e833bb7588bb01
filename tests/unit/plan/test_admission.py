"""Grant, queue or refuse."""

from __future__ import annotations

import pytest

from offloadd.plan.admission import Granted, Queued, Refused, Seat, admit, admit_sole, hopeless
from offloadd.state.actions import Decision, ModelState
from offloadd.state.desired import QueueLimits, RunMode
from offloadd.state.ids import ModelName
from offloadd.state.observed import Signal
from offloadd.units import Instant
from tests.unit.plan.build import ALPHA, NOW, key, spec

QWEN = spec("qwen", queue=QueueLimits(max_waiting=2))


def seat(name: str, leases: int, slots: int = 4) -> Seat:
    return Seat(instance=key(name), backend=ALPHA, leases=leases, slots=slots)


def verdict(state: ModelState, sentence: str = "because", retry_in: float | None = None) -> Decision:
    at = None if retry_in is None else Instant(NOW + retry_in)
    return Decision(model=ModelName("qwen"), state=state, sentence=sentence, retry_at=at)


def test_the_least_loaded_instance_gets_it() -> None:
    answer = admit(QWEN, None, [seat("qwen-1", 2), seat("qwen-2", 1)], 0, now=NOW)
    assert answer == Granted(instance=key("qwen-2"), why="qwen-2 is ready with 1 of 4 slots busy")


@pytest.mark.parametrize(
    "heard", [None, Signal(at=NOW, beyond=3), Signal(at=Instant(NOW - 60), beyond=3)], ids=["nothing", "now", "long ago"]
)
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("leases", range(6))
def test_the_only_instance_gets_it_as_it_would_from_a_choice(leases: int, slots: int, heard: Signal | None) -> None:
    """The short question has the long one's answer, to the word."""
    answer = admit(QWEN, None, [seat("qwen-1", leases, slots)._replace(signal=heard)], 0, now=NOW)
    short = admit_sole(key("qwen-1"), leases, slots, heard, now=NOW)
    assert answer == (Queued() if short is None else Granted(instance=key("qwen-1"), why=short))
    assert (short is None) == (leases >= slots)


def test_load_is_relative_to_slots() -> None:
    answer = admit(QWEN, None, [seat("qwen-1", 1, 2), seat("qwen-2", 2, 8)], 0, now=NOW)
    assert isinstance(answer, Granted)
    assert answer.instance == key("qwen-2")


def test_nobody_overtakes_those_who_wait() -> None:
    assert admit(QWEN, None, [seat("qwen-1", 0)], 1, now=NOW) == Queued()


def test_it_waits_while_all_slots_are_busy_whatever_the_last_verdict() -> None:
    assert admit(QWEN, verdict(ModelState.FAILED), [seat("qwen-1", 4)], 0, now=NOW) == Queued()


def test_a_full_queue_refuses() -> None:
    message = "qwen has 2 requests waiting, which is its limit (queue.max_waiting)"
    assert admit(QWEN, None, [], 2, now=NOW) == Refused(status=429, code="queue_full", message=message, retry_after=5)


@pytest.mark.parametrize(
    "state", [ModelState.OFF, ModelState.WAITING, ModelState.STARTING, ModelState.LOADING, ModelState.STOPPING]
)
def test_it_waits_while_there_is_hope(state: ModelState) -> None:
    assert admit(QWEN, verdict(state), [], 0, now=NOW) == Queued()


def test_a_model_that_never_runs_refuses() -> None:
    message = "qwen is configured with run: never"
    assert hopeless(spec("qwen", run=RunMode.NEVER), None, now=NOW) == Refused(status=409, code="model_disabled", message=message)


def test_a_failed_model_refuses_with_its_reason() -> None:
    answer = hopeless(QWEN, verdict(ModelState.FAILED, "its file is damaged"), now=NOW)
    assert answer == Refused(status=503, code="model_failed", message="qwen cannot be served: its file is damaged")


def test_a_short_backoff_is_waited_out_and_a_long_one_says_when_to_come_back() -> None:
    assert hopeless(QWEN, verdict(ModelState.BACKOFF, "it crashed", retry_in=5), now=NOW) is None
    assert hopeless(QWEN, verdict(ModelState.BACKOFF, "it crashed", retry_in=40), now=NOW) == Refused(
        status=503, code="model_backing_off", message="qwen keeps failing: it crashed; next try in 40 s", retry_after=40
    )
