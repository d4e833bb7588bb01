"""Who is put to sleep, when its promise is lowered, and who is woken: single plans on one GPU of 24 GiB, `now` is 1000."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from offloadd.plan.foresee import foresee
from offloadd.plan.planner import plan
from offloadd.state.actions import Plan, RestInstance, SleepInstance, StopInstance
from offloadd.state.demand import Demand, Loan, Waiting, Wish
from offloadd.state.desired import Budget, DesiredState, DeviceBudget, ModelSpec, Replicas
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import ExitKind, Placement, VramEstimate
from offloadd.state.observed import DeviceView, ExitRecord, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant, Seconds
from tests.unit.plan.build import ALPHA, BETA, NOW, ended, gib, offer, ram, spec, view, waits

GPU = DeviceId(LOCAL, "GPU-a")
IDLE = Instant(NOW - 700)
"""Longer ago than the ten minutes of idle_timeout."""


def placed(size: float, asleep: float = 1.0, *, elastic: bool = False) -> Placement:
    return Placement(reserved={GPU: gib(size), HOST_RAM: gib(1)}, gpus=(GPU,), asleep={GPU: gib(asleep)}, elastic=elastic)


def ready(name: str = "m-1", size: float = 10.0, **fields: object) -> InstanceView:
    plain: dict[str, object] = {"placement": placed(size), "measured": {GPU: gib(size)}, "started_at": IDLE, "since": IDLE}
    return view(name, size, **plain | fields)  # type: ignore[arg-type]


def sleeping(name: str = "m-1", size: float = 10.0, **fields: object) -> InstanceView:
    full = placed(size)
    now = replace(full, reserved={**full.reserved, GPU: gib(1)})
    plain: dict[str, object] = {"state": InstanceState.SLEEPING, "placement": now, "awake": full, "measured": {GPU: gib(0.75)}}
    return ready(name, size, **plain | fields)


def falling(held: float, **fields: object) -> InstanceView:
    plain: dict[str, object] = {
        "state": InstanceState.FALLING_ASLEEP,
        "since": Instant(NOW - 2),
        "slept_at": Instant(NOW - 1),
        "measured": {GPU: gib(held)},
    }
    return ready(**plain | fields)


def pictured(
    *views: InstanceView, specs: tuple[ModelSpec, ...] = (), free: float | None = None, **seen: object
) -> tuple[DesiredState, ObservedState]:
    used = sum(one.measured.get(GPU, 0) for one in views) / 2**30
    card = DeviceView(
        id=GPU, kind=DeviceKind.NVIDIA, name="card", total=gib(24), free=gib(24 - used if free is None else free), read_at=NOW
    )
    models = {one.name: one for one in (specs or tuple({one.model: spec(one.model) for one in views}.values()))}
    plain: dict[str, object] = {
        "instances": {one.id: one for one in views},
        "devices": {GPU: card, HOST_RAM: ram(60, 64)},
        "candidates": {name: (offer(10, backend=model.backends[0]),) for name, model in models.items()},
        "launches": {one.model: one.id.number for one in views},
    }
    budget = Budget(gpu_default=DeviceBudget(limit=Bytes(gib(24))))
    return DesiredState(models=models, budget=budget), ObservedState(**plain | seen)  # type: ignore[arg-type]


def planned(picture: tuple[DesiredState, ObservedState], demand: Demand | None = None, at: float = NOW) -> Plan:
    return plan(picture[0], picture[1], demand or Demand(), now=Instant(at))


def does(made: Plan) -> list[str]:
    return [
        f"{type(action).__name__.removesuffix('Instance').lower()} {getattr(action, 'instance', '')}" for action in made.actions
    ]


def wanting(*names: str, leases: Mapping[object, int] | None = None, **fields: object) -> Demand:
    waiting: dict[ModelName, Waiting] = {ModelName(name): waits() for name in names}
    return Demand(waiting=waiting, leases=leases or {}, **fields)  # type: ignore[arg-type]


def test_an_idle_one_sleeps_and_says_what_that_frees() -> None:
    made = planned(pictured(ready()))
    (action,) = made.actions
    assert isinstance(action, SleepInstance)
    assert action.free == {GPU: gib(14)}
    said = "m-1 is put to sleep on alpha, to free 9.0 GiB: idle for 11 min 40 s, idle_timeout is reached"
    assert made.decisions[ModelName("m")].sentence == said


@pytest.mark.parametrize(
    "fields",
    [
        {"placement": replace(placed(10), asleep={})},
        {"placement": placed(10, asleep=10)},  # it would free nothing
        {"fault": "it gives no token"},
        {"misses": 1},
    ],
)
def test_one_that_cannot_sleep_or_is_not_well_is_stopped(fields: dict[str, object]) -> None:
    assert does(planned(pictured(ready(**fields)))) == ["stop m-1"]


def kept(**fields: object) -> ExitRecord:
    record = ended("m-0", ago=100, kind=ExitKind.SLEEPLESS, expected=True, ready_for=Seconds(60))
    return replace(record, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "forgiven", "done"),
    [
        (kept(), None, "stop m-1"),
        (kept(fingerprint="other"), None, "sleep m-1"),
        (kept(), Instant(NOW - 50), "sleep m-1"),
    ],
)
def test_a_launch_that_kept_its_memory_asleep_is_not_tried_again(record: ExitRecord, forgiven: Instant | None, done: str) -> None:
    demand = Demand(forgiven={ModelName("m"): forgiven} if forgiven else {})
    assert does(planned(pictured(ready(), exits={ModelName("m"): (record,)}), demand)) == [done]


def test_while_another_measures_the_card_nobody_on_it_is_put_to_sleep_or_woken() -> None:
    loads = ready("w-1", 4, state=InstanceState.LOADING, since=NOW, started_at=NOW, placement=placed(4, elastic=True))
    assert does(planned(pictured(ready(), loads))) == []
    made = planned(pictured(sleeping(), loads), wanting("m"))
    assert does(made) == []
    assert "waits until w-1 has loaded, which measures the GPU meanwhile; m-1 sleeps" in made.decisions[ModelName("m")].sentence
    other = replace(loads, placement=placed(4))  # it loads, and does not look at what is free
    assert does(planned(pictured(sleeping(), other), wanting("m"))) == ["wake m-1"]


def test_one_that_measures_waits_for_who_falls_asleep_or_wakes() -> None:
    for mover in (falling(10, slept_at=None), sleeping(state=InstanceState.WAKING, placement=placed(10), awake=None, since=NOW)):
        need = VramEstimate(total=gib(6), basis="given", elastic=True)
        specs = (spec("m"), spec("w"))
        offers = {ModelName("m"): (offer(10),), ModelName("w"): (replace(offer(6), estimate=need),)}
        made = planned(pictured(mover, specs=specs, candidates=offers), wanting("w"))
        assert does(made) == []
        assert made.decisions[ModelName("w")].sentence.startswith("waits until m-1 has loaded")


@pytest.mark.parametrize(("held", "keeps"), [(0.75, 1.0), (2.0, 2.0), (3.2, 3.2)])
def test_its_promise_is_lowered_to_what_it_is_seen_to_hold_and_not_below_what_was_expected(held: float, keeps: float) -> None:
    (action,) = planned(pictured(falling(held))).actions
    assert isinstance(action, RestInstance)
    assert action.keeps == {GPU: gib(keeps)}


def test_too_little_has_come_free_and_it_is_waited_for_and_then_stopped() -> None:
    for at, done in ((NOW, []), (NOW + 8.9, []), (NOW + 9.1, ["stop m-1"])):
        picture = pictured(falling(8.0))
        fresh = {GPU: replace(picture[1].devices[GPU], read_at=Instant(at)), HOST_RAM: ram(60, 64)}
        assert does(planned((picture[0], replace(picture[1], devices=fresh)), at=at)) == done
    (stop,) = planned((picture[0], replace(picture[1], devices=fresh)), at=NOW + 9.1).actions
    assert isinstance(stop, StopInstance)
    assert stop.why == "it says that it sleeps, and holds 8.0 GiB of 10.0 GiB GPU memory 10 s later"


def test_without_a_reading_from_after_its_word_nobody_is_judged() -> None:
    old = pictured(falling(0.75))
    stale = {GPU: replace(old[1].devices[GPU], read_at=Instant(NOW - 1.5)), HOST_RAM: ram(60, 64)}
    for at in (NOW, NOW + 100):
        assert does(planned((old[0], replace(old[1], devices=stale)), at=at)) == []


def test_where_the_driver_tells_no_sizes_what_has_come_free_tells() -> None:
    blind = falling(0, measured={}, free_before={GPU: gib(14)})
    (action,) = planned(pictured(blind, free=23)).actions
    assert isinstance(action, RestInstance)
    assert action.keeps == {GPU: gib(1)}
    assert does(planned(pictured(blind, free=18))) == []


def test_one_that_never_says_that_it_sleeps_is_stopped() -> None:
    deaf = falling(10, slept_at=None, since=Instant(NOW - 59))
    assert does(planned(pictured(deaf))) == []
    assert does(planned(pictured(deaf), at=NOW + 1)) == ["stop m-1"]


def test_who_makes_room_sleeps_where_that_is_enough_and_leaves_where_it_is_not() -> None:
    specs = (spec("m"), spec("w"))
    small = {ModelName("m"): (offer(10),), ModelName("w"): (offer(20),)}
    large = {ModelName("m"): (offer(10),), ModelName("w"): (offer(24),)}
    used = wanting("w", last_used={ModelName("m"): Instant(NOW - 60)})
    made = planned(pictured(ready(), specs=specs, candidates=small), used)
    assert does(made) == ["sleep m-1"]
    assert made.decisions[ModelName("w")].sentence.endswith("; putting m-1 (idle 1 min) to sleep")
    assert does(planned(pictured(ready(), specs=specs, candidates=large), used)) == ["stop m-1"]
    assert does(planned(pictured(sleeping(), specs=specs, candidates=large), used)) == ["stop m-1"]
    busy = wanting("w", leases={ready().id: 1})
    assert does(planned(pictured(ready(), specs=specs, candidates=small), busy)) == []


def test_a_loan_has_them_sleep_too() -> None:
    loan = Loan(id="l", size=gib(20), since=NOW)
    used = {ModelName("m"): Instant(NOW - 60)}
    assert does(planned(pictured(ready()), Demand(loans={"l": loan}, last_used=used))) == ["sleep m-1"]


def test_a_request_wakes_it_with_all_its_memory_first() -> None:
    made = planned(pictured(sleeping()), wanting("m"))
    assert does(made) == ["wake m-1"]
    assert made.decisions[ModelName("m")].sentence == "m-1 wakes on alpha and takes 9.0 GiB again: 1 request waits"
    crowd = ready("w-1", 20)
    crowded = planned(pictured(sleeping(), crowd), wanting("m", leases={crowd.id: 1}))
    assert does(crowded) == []
    said = crowded.decisions[ModelName("m")].sentence
    assert said.startswith("waits: needs 9.0 GiB on gpu0, 3.0 GiB free, and nothing may be evicted for it now; m-1 sleeps on alpha")


def test_a_reading_must_be_fresh_before_memory_is_given_to_wake() -> None:
    desired, observed = pictured(sleeping())
    old = {GPU: replace(observed.devices[GPU], read_at=Instant(NOW - 3)), HOST_RAM: ram(60, 64)}
    made = planned((desired, replace(observed, devices=old)), wanting("m"))
    assert (does(made), made.read_now) == ([], True)


def test_nobody_wakes_without_demand_and_what_is_stale_asleep_is_stopped() -> None:
    assert does(planned(pictured(sleeping()))) == []
    assert does(planned(pictured(sleeping(fingerprint="old")))) == ["stop m-1"]


def test_by_hand_it_is_woken_or_stopped() -> None:
    for load, done in ((True, "wake m-1"), (False, "stop m-1")):
        wish = Wish(load=load, since=Instant(NOW - 1), newest=1)
        assert does(planned(pictured(sleeping()), Demand(wishes={ModelName("m"): wish}))) == [done]


def test_a_request_that_names_an_engine_wakes_that_engines_instance() -> None:
    both = (spec("m", backends=(ALPHA, BETA)),)
    offers = {ModelName("m"): (offer(4), offer(10, backend=BETA))}
    picture = pictured(ready("m-1", 4), sleeping("m-2", backend=BETA), specs=both, candidates=offers)
    name = ModelName("m")
    named = wanting("m", waiting_for={name: frozenset({BETA})}, named={name: {BETA: NOW}}, leases={ready().id: 1})
    assert does(planned(picture, named)) == ["wake m-2"]


def test_a_spare_replica_is_woken_in_place_of_a_start() -> None:
    specs = (spec("m", replicas=Replicas(min=1, max=2)),)
    picture = pictured(ready("m-1", 4), sleeping("m-2", 4), specs=specs)
    late = Demand(waiting={ModelName("m"): waits(ago=3)}, leases={ready().id: 4})
    assert does(planned(picture, late)) == ["wake m-2"]


@pytest.mark.parametrize("waking", [replace(sleeping(), state=InstanceState.WAKING, placement=placed(10), awake=None, since=NOW)])
def test_one_that_does_not_wake_is_stopped_as_one_at_fault(waking: InstanceView) -> None:
    assert does(planned(pictured(waking), wanting("m"), at=NOW + 599)) == []
    assert does(planned(pictured(waking), wanting("m"), at=NOW + 600)) == ["stop m-1"]
    (stop,) = planned(pictured(replace(waking, fault="it does not wake: /wake_up: status 500")), wanting("m")).actions
    assert isinstance(stop, StopInstance)
    assert (stop.reason, stop.why) == ("hung", "it does not wake: /wake_up: status 500")


def test_foreseen_it_sleeps_and_the_other_one_starts() -> None:
    specs = (spec("m"), spec("w"))
    offers = {ModelName("m"): (offer(10),), ModelName("w"): (offer(20),)}
    desired, observed = pictured(ready(), specs=specs, candidates=offers)
    ahead = foresee(desired, observed, wanting("w", last_used={ModelName("m"): Instant(NOW - 60)}), now=NOW)
    assert [type(action).__name__ for action in ahead.actions] == ["SleepInstance", "StartInstance"]
    assert ahead.last.accounts[GPU].reserved == gib(21)
