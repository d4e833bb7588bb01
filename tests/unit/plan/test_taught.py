"""A launch that ran out of memory is not repeated with as little; a GPU's reading is renewed before its memory is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.plan.planner import plan
from offloadd.plan.restart import taught
from offloadd.state.demand import Demand, Loan
from offloadd.state.desired import DesiredState, RunMode
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import ExitCause, ExitKind, VramEstimate
from offloadd.state.observed import DeviceView, ObservedState
from offloadd.units import Bytes, Instant
from tests.unit.plan.build import NOW, Scene, ended, gib, offer, spec

OOM = ExitCause(kind=ExitKind.OUT_OF_MEMORY, message="there was not enough memory to load the model")
RAM = ExitCause(kind=ExitKind.OUT_OF_HOST_MEMORY, message="killed for want of RAM")
GPU = DeviceId(LOCAL, "GPU-0")


def test_each_time_it_is_given_more() -> None:
    scene = Scene(spec("a", run=RunMode.ALWAYS), size=4).had(ended("a-1", 5, cause=OOM))
    assert scene.says("a") == "starting: starts as a-1 on alpha with 4.6 GiB (it ran out of memory with less): run: always"
    scene.had(ended("a-2", 4, cause=OOM))
    (start,) = scene.plan(at=NOW + 60).actions
    assert start.placement.total == pytest.approx(gib(4 * 1.15**2), abs=2)


def test_others_leave_for_what_is_more() -> None:
    scene = Scene(spec("a"), size=9).had(ended("a-1", 5, cause=OOM)).wait("a")
    assert scene.does() == ["start a-1"]
    scene.free = 10.0
    assert scene.says("a").startswith("waiting: waits: needs 10.3 GiB")


def test_what_can_never_be_had_is_said_with_the_arithmetic() -> None:
    scene = Scene(spec("a", run=RunMode.ALWAYS), size=12).had(ended("a-1", 5, cause=OOM))
    assert scene.says("a") == "failed: needs 13.8 GiB on host, more than its limit of 12.8 GiB"


def test_a_run_that_proved_itself_or_a_hand_takes_it_back() -> None:
    well = ended("a-2", 2, ready_for=601.0, expected=True)
    assert Scene(spec("a"), size=4).had(ended("a-1", 5, cause=OOM), well).wait("a").plan().actions[0].placement.total == gib(4)
    by_hand = Scene(spec("a"), size=4).had(ended("a-1", 5, cause=OOM)).by_hand("a", load=True)
    assert by_hand.plan().actions[0].placement.total == gib(4)


def test_want_of_ram_raises_what_lies_in_ram_only() -> None:
    need = VramEstimate(
        total=Bytes(1000), basis="given", layers=(Bytes(900),), fixed=Bytes(100), host=Bytes(100), on_host=Bytes(800)
    )
    more = taught(need, [ended("a-1", 5, cause=RAM)])
    assert (more.total, more.layers, more.host, more.on_host) == (1000, (900,), 114, 919)
    more = taught(need, [ended("a-1", 5, cause=OOM)])
    assert (more.total, sum(more.layers) + more.fixed, more.host) == (1150, 1150, 100)


def card(*, read: float | None, free: float = 24.0) -> DeviceView:
    at = None if read is None else Instant(NOW - read)
    return DeviceView(id=GPU, kind=DeviceKind.NVIDIA, name="card", total=gib(24), free=gib(free), read_at=at)


def observed(view: DeviceView) -> ObservedState:
    return ObservedState(devices={GPU: view}, candidates={ModelName(name): (offer(20),) for name in ("a", "b")})


DESIRED = DesiredState(
    models={one.name: one for one in (spec("a", run=RunMode.ALWAYS, priority=60), spec("b", run=RunMode.ALWAYS))}
)


def test_memory_is_given_on_a_fresh_reading_only_and_held_until_then() -> None:
    made = plan(DESIRED, observed(card(read=1.5)), Demand(), now=NOW)
    assert (made.actions, made.read_now) == ((), True)
    assert made.decisions["a"].sentence == "wanted: gpu0 is read again before its memory is given"
    assert made.decisions["b"].state == "waiting"
    fresh = plan(DESIRED, observed(card(read=0.1)), Demand(), now=NOW)
    assert ([str(action.instance) for action in fresh.actions], fresh.read_now) == (["a-1"], False)


def test_a_program_that_came_in_between_is_seen() -> None:
    made = plan(DESIRED, observed(card(read=0.0, free=10)), Demand(), now=NOW)
    assert made.actions == ()
    assert made.decisions["a"].sentence.startswith("waits: needs 20.0 GiB on gpu0, 10.0 GiB free")


def test_a_loan_is_given_on_a_fresh_reading_too() -> None:
    loan = Loan(id="loan-1", size=gib(20), since=NOW)
    scene = replace(observed(card(read=3.0)), candidates={})
    made = plan(DesiredState(), scene, Demand(loans={"loan-1": loan}), now=NOW)
    assert (made.actions, made.read_now) == ((), True)
    assert made.loans == {"loan-1": "waits: needs 20.0 GiB on gpu0, which is being read again"}
