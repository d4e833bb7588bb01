"""What an operator asks for by hand: it wins over the config, shows in the sentence, and forgives failures."""

from __future__ import annotations

from offloadd.plan.admission import hopeless
from offloadd.state.desired import RunMode
from offloadd.state.ids import ModelName
from offloadd.state.observed import InstanceState
from offloadd.units import Instant
from tests.unit.plan.build import BAD_FILE, NOW, Scene, ended, spec, view

ALWAYS, NEVER = RunMode.ALWAYS, RunMode.NEVER


def test_a_model_that_nobody_asks_for_is_loaded_and_says_by_whom() -> None:
    scene = Scene(spec("a")).by_hand("a", load=True, ago=3)
    assert scene.does() == ["start a-1"]
    assert scene.says("a") == "starting: starts as a-1 on alpha with 4.0 GiB: loaded by hand"


def test_it_makes_idle_ones_leave_for_it() -> None:
    scene = Scene(spec("a"), spec("b"), size=9).has(view("b-1", 9), idle_for=50).by_hand("a", load=True)
    assert scene.does() == ["stop b-1"]


def test_it_stays_however_idle_it_is() -> None:
    scene = Scene(spec("a", idle_timeout=10)).has(view("a-1", 4), idle_for=5000).by_hand("a", load=True)
    assert scene.does() == []


def test_a_model_that_never_runs_can_be_loaded_and_then_takes_requests() -> None:
    never = spec("a", run=NEVER)
    scene = Scene(never).by_hand("a", load=True)
    assert scene.does() == ["start a-1"]
    assert hopeless(never, scene.plan().decisions[ModelName("a")], now=NOW) is None
    refused = hopeless(never, Scene(never).plan().decisions[ModelName("a")], now=NOW)
    assert refused is not None
    assert refused.code == "model_disabled"


def test_to_load_it_clears_a_give_up_and_a_broken_file() -> None:
    for exits in ([ended(f"a-{n}", 50) for n in range(1, 11)], [ended("a-1", 50, cause=BAD_FILE)]):
        scene = Scene(spec("a", run=ALWAYS)).had(*exits)
        assert scene.says("a").startswith("failed: ")
        assert scene.by_hand("a", load=True).does() == ["start a-1"]


def test_failures_after_it_count_again() -> None:
    scene = Scene(spec("a")).by_hand("a", load=True, ago=30).had(ended("a-1", 50), ended("a-2", 2, cause=BAD_FILE))
    assert scene.says("a").startswith("failed: its file is damaged")


def test_an_idle_one_is_unloaded_and_a_busy_one_drains() -> None:
    scene = Scene(spec("a", run=ALWAYS)).has(view("a-1", 4)).by_hand("a", load=False)
    assert scene.does() == ["stop a-1"]
    assert "unloaded by hand" in scene.says("a")
    assert Scene(spec("a")).has(view("a-1", 4), leases=1).by_hand("a", load=False).does() == ["drain a-1"]


def test_a_pinned_and_an_always_model_stays_unloaded_until_a_request_comes() -> None:
    scene = Scene(spec("a", run=ALWAYS, pinned=True)).by_hand("a", load=False, ago=60)
    assert scene.does() == []
    assert scene.says("a") == "off: off: unloaded by hand, and no request has come since"
    assert scene.wait("a").does() == ["start a-1"]


def test_what_came_for_a_later_request_is_not_sent_away() -> None:
    scene = (
        Scene(spec("a", run=ALWAYS)).has(view("a-2", 4, started_at=Instant(NOW - 10)), idle_for=5).by_hand("a", load=False, ago=60)
    )
    assert scene.does() == []


def test_a_request_that_waits_while_it_is_unloaded_gets_a_new_one() -> None:
    old = view("a-1", 4, InstanceState.DRAINING, drain_deadline=Instant(NOW + 10))
    scene = Scene(spec("a")).has(old, leases=1).by_hand("a", load=False).wait("a")
    assert scene.does() == ["start a-2"]
