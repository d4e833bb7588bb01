"""What becomes of servers that an earlier daemon left running, and of those that are sick or have grown too large."""

from __future__ import annotations

from offloadd.state.actions import StopInstance, StopReason
from offloadd.state.desired import HealthPolicy, RunMode
from offloadd.state.observed import InstanceState
from offloadd.units import Instant
from tests.unit.plan.build import NOW, Scene, gib, spec, view

ORPHANED = InstanceState.ORPHANED
ALWAYS = RunMode.ALWAYS


def test_an_orphan_that_is_wanted_is_adopted_and_nothing_is_started() -> None:
    assert Scene(spec("a", run=ALWAYS)).has(view("a-7", 4, ORPHANED)).does() == ["adopt a-7"]


def test_an_orphan_whose_model_is_gone_is_stopped() -> None:
    assert Scene().has(view("a-7", 4, ORPHANED)).does() == ["stop a-7"]


def test_an_orphan_that_never_runs_any_more_is_stopped() -> None:
    assert Scene(spec("a", run=RunMode.NEVER)).has(view("a-7", 4, ORPHANED)).does() == ["stop a-7"]


def test_an_orphan_of_an_older_config_serves_until_its_successor_is_ready() -> None:
    scene = Scene(spec("a", run=ALWAYS)).has(view("a-7", 4, ORPHANED, fingerprint="then"))
    assert scene.does() == ["adopt a-7", "start a-8"]


def test_of_two_orphans_where_one_is_wanted_one_is_stopped() -> None:
    scene = Scene(spec("a", run=ALWAYS)).has(view("a-7", 2, ORPHANED)).has(view("a-8", 2, ORPHANED))
    assert scene.does() == ["adopt a-7", "stop a-8"]


def test_an_orphan_holds_its_memory_before_it_is_adopted() -> None:
    scene = Scene(spec("a", run=ALWAYS), spec("b", run=ALWAYS), size=8).has(view("a-1", 8, ORPHANED))
    assert scene.does() == ["adopt a-1"]
    assert scene.says("b").startswith("waiting: waits: needs 8.0 GiB")


def test_an_orphan_started_long_ago_is_not_idle_at_once() -> None:
    """Nobody knows when it was last used: its idle time begins with the adoption."""
    scene = Scene(spec("a", idle_timeout=600)).has(view("a-1", 4, started_at=Instant(-9000), adopted_at=Instant(NOW - 1)))
    assert scene.does() == []


def test_an_orphan_is_not_idle_before_it_is_adopted_either() -> None:
    left = view("a-1", 4, ORPHANED, started_at=Instant(-9000), ready_at=Instant(-8000), since=NOW)
    assert Scene(spec("a", idle_timeout=600)).has(left).does() == ["adopt a-1"]


def test_an_orphan_may_leave_for_a_waiter_before_it_is_adopted() -> None:
    left = view("a-1", 4, ORPHANED, started_at=Instant(-9000), ready_at=Instant(-8000), since=NOW)
    scene = Scene(spec("a"), spec("b"), size=10).has(left).wait("b")
    assert scene.does() == ["stop a-1"]


def test_an_adopted_one_is_given_its_start_timeout_anew() -> None:
    late = view("a-1", 4, InstanceState.LOADING, started_at=Instant(-9000), adopted_at=Instant(NOW - 1))
    assert Scene(spec("a", run=ALWAYS)).has(late).does() == []


def test_one_that_failed_its_canary_is_stopped_unless_a_request_shows_life() -> None:
    sick = view("a-1", 4, fault="one token took longer than 30 s")
    (stop,) = Scene(spec("a", run=ALWAYS)).has(sick).plan().actions
    assert isinstance(stop, StopInstance)
    assert (stop.reason, stop.why) == (StopReason.HUNG, "one token took longer than 30 s")
    assert Scene(spec("a", run=ALWAYS)).has(sick, leases=1).does() == []


def test_one_grown_beyond_its_ceiling_serves_until_a_fresh_one_is_ready() -> None:
    limited = spec("a", run=ALWAYS, health=HealthPolicy(rss_limit=gib(3)))
    grown = view("a-1", 4, ready_at=Instant(NOW - 300))
    assert Scene(limited).has(grown).does() == ["start a-2"]
    fresh = view("a-2", 2, ready_at=Instant(NOW - 1))
    plan = Scene(limited).has(grown).has(fresh).plan()
    assert [action.why for action in plan.actions] == ["it has grown to 4.0 GiB of RAM, its ceiling is 3.0 GiB (health.rss_limit)"]


def test_one_grown_beyond_its_ceiling_leaves_first_where_there_is_no_room_for_two_and_with_requests_drains() -> None:
    limited = spec("a", run=ALWAYS, health=HealthPolicy(rss_limit=gib(3)))
    grown = view("a-1", 8, ready_at=Instant(NOW - 300))
    assert Scene(limited, size=8).has(grown).does() == ["stop a-1"]
    assert Scene(limited, size=8).has(grown, leases=1).does() == ["drain a-1"]


def test_a_ceiling_too_low_for_a_fresh_one_does_not_start_a_treadmill() -> None:
    limited = spec("a", run=ALWAYS, health=HealthPolicy(rss_limit=gib(1)))
    scene = Scene(limited).has(view("a-1", 4, ready_at=Instant(NOW - 20)))
    assert scene.does() == []
    assert scene.plan().wake_at is not None


def test_a_process_that_cannot_be_killed_keeps_its_memory_and_bars_no_other() -> None:
    stuck = view("a-1", 4, InstanceState.STOPPING, stuck=True)
    assert Scene(spec("a", run=ALWAYS), size=4).has(stuck).does() == ["start a-2"]
    assert Scene(spec("a", run=ALWAYS), size=9).has(stuck).does() == []


def test_a_silent_replica_is_passed_over() -> None:
    assert not view("a-1", 1).ejected
    assert view("a-1", 1, misses=1).ejected
    assert view("a-1", 1, fault="dead").ejected
