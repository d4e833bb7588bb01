"""How many instances are wanted, and why."""

from __future__ import annotations

from offloadd.plan.draft import Draft
from offloadd.plan.wants import EVER, Want, wanted
from offloadd.state.actions import StopReason
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec, Replicas, RunMode
from offloadd.state.observed import InstanceState, InstanceView, ObservedState
from offloadd.units import Instant, Seconds
from tests.unit.plan.build import NOW, spec, view, waits


def want(one: ModelSpec, *views: InstanceView, waiting: int = 0, leases: int = 0, used: float | None = None) -> Want:
    demand = Demand(
        waiting={one.name: waits(waiting)} if waiting else {},
        leases={views[0].id: leases} if leases else {},
        last_used={} if used is None else {one.name: Instant(used)},
    )
    observed = ObservedState(instances={view.id: view for view in views})
    return wanted(Draft(DesiredState(models={one.name: one}), observed, demand, NOW), one)


def test_run_never_wants_none() -> None:
    got = want(spec("qwen", run=RunMode.NEVER), waiting=3)
    assert (got.count, got.why) == (0, "run: never")


def test_run_always_wants_its_replicas_before_anybody_else() -> None:
    got = want(spec("qwen", run=RunMode.ALWAYS, replicas=Replicas(min=2, max=2)))
    assert (got.count, got.why, got.since, got.urgent) == (2, "run: always", EVER, True)


def test_nobody_asks_for_it() -> None:
    got = want(spec("qwen"))
    assert (got.count, got.why) == (0, "no request wants it")


def test_requests_want_it_since_the_oldest_came() -> None:
    got = want(spec("qwen"), waiting=1)
    assert (got.count, got.why, got.since, got.urgent) == (1, "1 request waits", NOW - 1, True)
    assert want(spec("qwen"), waiting=2).why == "2 requests wait"


def test_a_served_request_keeps_it_without_moving_others() -> None:
    got = want(spec("qwen"), view("qwen-1", 4), leases=2, used=0)
    assert (got.count, got.why, got.urgent) == (1, "2 requests run", False)


def test_an_idle_one_stays_until_its_idle_timeout() -> None:
    got = want(spec("qwen", idle_timeout=Seconds(60)), view("qwen-1", 4), used=959)
    assert (got.count, got.why) == (1, "idle for 41 s")
    got = want(spec("qwen", idle_timeout=Seconds(60)), view("qwen-1", 4), used=940)
    assert (got.count, got.why, got.end) == (0, "idle for 1 min, idle_timeout is reached", StopReason.IDLE)


def test_idle_timeout_zero_keeps_it_loaded() -> None:
    got = want(spec("qwen", idle_timeout=Seconds(0)), view("qwen-1", 4), used=0)
    assert (got.count, got.why) == (1, "idle_timeout: 0 keeps it loaded")


def test_one_on_its_way_out_is_not_held_back() -> None:
    assert want(spec("qwen"), view("qwen-1", 4, InstanceState.DRAINING), leases=1).count == 0


def test_a_replacement_is_not_idle_while_requests_run_on_its_predecessor() -> None:
    old, new = view("qwen-1", 4, InstanceState.DRAINING), view("qwen-2", 4)
    got = want(spec("qwen", idle_timeout=Seconds(5)), old, new, leases=1, used=900)
    assert (got.count, got.why) == (1, "1 request runs")


def test_priority_comes_first_then_the_longest_wait() -> None:
    early, late = (Want(spec=spec(name), count=1, why="", since=Instant(at)) for name, at in (("b", 1), ("a", 2)))
    urgent = Want(spec=spec("c", priority=60), count=1, why="", since=Instant(3))
    assert sorted([late, early, urgent], key=lambda one: one.rank) == [urgent, early, late]
