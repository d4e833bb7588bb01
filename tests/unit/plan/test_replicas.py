"""Replicas: one more where requests keep waiting and room is free, one less when it was idle for a while."""

from __future__ import annotations

import pytest

from offloadd.state.desired import Replicas, RunMode
from offloadd.state.observed import InstanceState
from offloadd.units import Instant
from tests.unit.plan.build import NOW, Scene, key, spec, view

UP_TO_3 = Replicas(min=1, max=3)


def busy(ago: float, *, size: float = 3.0, **fields: object) -> Scene:
    """One ready instance with all its slots taken, and a request that waits."""
    return Scene(spec("a", replicas=UP_TO_3, **fields), size=size).has(view("a-1", size), leases=4).wait("a", ago=ago)


def test_a_short_wait_starts_no_other() -> None:
    scene = busy(1.5)
    assert scene.does() == []
    assert scene.plan().wake_at == NOW + 0.5


def test_a_wait_that_lasts_does() -> None:
    scene = busy(2.5)
    assert scene.does() == ["start a-2"]
    assert scene.says("a") == "ready: a-1 is ready on alpha with 3.0 GiB, 4 requests run; a-2 starts beside it"


def test_one_at_a_time() -> None:
    assert busy(60).has(view("a-2", 3, InstanceState.LOADING)).does() == []
    assert busy(60).has(view("a-2", 3), leases=4).does() == ["start a-3"]


def test_never_more_than_max() -> None:
    assert busy(60).has(view("a-2", 3), leases=4).has(view("a-3", 3), leases=4).does() == []
    assert Scene(spec("a")).has(view("a-1", 4), leases=4).wait("a", ago=60).does() == []


def test_nobody_leaves_for_it_and_it_says_what_is_short() -> None:
    scene = busy(60, size=5).has(view("b-1", 5, spec=spec("b")), idle_for=500)
    scene.models["b"] = spec("b")
    scene.offers("b", *scene.candidates["a"])
    assert scene.does() == []
    assert scene.says("a").endswith("another cannot start: needs 5.0 GiB on host, 2.8 GiB free")


def test_who_waits_for_a_first_instance_comes_before_it() -> None:
    scene = busy(60, size=5)
    scene.models["b"] = spec("b", priority=10)
    scene.offers("b", *scene.candidates["a"]).wait("b", ago=0.1)
    assert scene.does() == ["start b-1"]


def test_an_idle_replica_leaves_after_a_minute_and_the_last_one_stays() -> None:
    scene = Scene(spec("a", replicas=UP_TO_3, idle_timeout=600), size=3)
    for number in (1, 2):
        scene.has(view(f"a-{number}", 3, ready_at=Instant(500.0), since=Instant(500.0)), idle_for=30)
        scene.idle_since[key(f"a-{number}")] = Instant(NOW - 59)
    assert scene.does() == []
    assert scene.plan().wake_at == NOW + 1
    scene.idle_since[key("a-2")] = Instant(NOW - 60)
    assert scene.does() == ["stop a-2"]


def test_an_idle_replica_stays_while_requests_wait() -> None:
    scene = Scene(spec("a", replicas=UP_TO_3), size=3).has(view("a-1", 3), leases=4)
    scene.has(view("a-2", 3, since=Instant(10.0))).wait("a", ago=0.5)
    assert scene.does() == []


@pytest.mark.parametrize("run", [RunMode.ALWAYS, RunMode.ON_DEMAND])
def test_min_is_what_runs_when_it_runs_at_all(run: RunMode) -> None:
    for least, expected in ((0, 1), (1, 1), (2, 2)):
        scene = Scene(spec("a", run=run, replicas=Replicas(min=least, max=3)), size=3).wait("a")
        assert scene.does() == [f"start a-{number}" for number in range(1, expected + 1)]


def test_min_0_ends_with_none() -> None:
    scene = Scene(spec("a", replicas=Replicas(min=0, max=3), idle_timeout=60)).has(
        view("a-1", 4, started_at=Instant(10.0)), idle_for=61
    )
    assert scene.does() == ["stop a-1"]


def test_always_models_are_given_room_in_the_order_of_their_priority() -> None:
    specs = [spec(name, run=RunMode.ALWAYS, priority=priority) for name, priority in (("a", 10), ("b", 90), ("c", 50))]
    scene = Scene(*specs, size=6)
    assert scene.does() == ["start b-1", "start c-1"]
    assert scene.says("a").startswith("waiting: waits: needs 6.0 GiB")
