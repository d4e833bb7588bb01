"""Room for one that does not fit: who leaves, what is waited for, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.plan.planner import plan
from offloadd.plan.upkeep import RELEASE_TIME
from offloadd.state.actions import Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import Candidate, ExitKind, Placement
from offloadd.state.observed import DeviceView, ExitRecord, InstanceState, InstanceView, ObservedState
from offloadd.units import Instant
from tests.unit.plan.build import NOW, Scene, ended, gib, offer, ram, spec, view, waits

ONE, TWO = (DeviceId(LOCAL, f"GPU-{letter}") for letter in "ab")


def card(device: DeviceId, index: int, free: float) -> DeviceView:
    """24 GiB, of which 22.3 may be promised."""
    return DeviceView(id=device, kind=DeviceKind.NVIDIA, name="card", index=index, total=gib(24), free=gib(free))


def on(device: DeviceId, name: str, size: float, **fields: object) -> InstanceView:
    placed = Placement(reserved={device: gib(size)}, gpus=(device,))
    return view(name, size, placement=placed, measured={device: gib(size)}, **fields)


def decide(
    specs: tuple[ModelSpec, ...], offers: dict[str, Candidate], *views: InstanceView, waiting: str = "", seen: bool = True
) -> Plan:
    """A machine with 16 GiB of RAM and two cards, which can be seen or not."""
    used = {device: sum(one.measured.get(device, 0) for one in views) / 2**30 for device in (ONE, TWO)}
    devices = {HOST_RAM: ram()} | ({ONE: card(ONE, 0, 24 - used[ONE]), TWO: card(TWO, 1, 24 - used[TWO])} if seen else {})
    observed = ObservedState(
        instances={one.id: one for one in views},
        devices=devices,
        candidates={ModelName(name): (one,) for name, one in offers.items()},
        blind="" if seen else "the driver does not answer",
    )
    demand = Demand(waiting={ModelName(waiting): waits()} if waiting else {})
    return plan(DesiredState(models={one.name: one for one in specs}), observed, demand, now=NOW)


def done(answer: Plan) -> list[str]:
    return sorted(f"{type(action).__name__} {action.instance}" for action in answer.actions)  # type: ignore[union-attr]


def late(ago: float) -> Scene:
    """A large model waits first and a small one behind it; 4 GiB of what ended a while ago show as used by nobody."""
    scene = Scene(spec("large"), spec("small")).offers("large", offer(11)).offers("small", offer(4))
    scene.wait("large", ago=30).wait("small", ago=5).had(ended("gone-1", ago, ExitKind.STOPPED, expected=True))
    scene.exits = {ModelName("small"): next(iter(scene.exits.values()))}
    scene.free = 9.0
    return scene


def test_what_just_ended_is_waited_for_and_nobody_behind_takes_the_room() -> None:
    scene = late(ago=1)
    assert scene.does() == []
    assert scene.says("large") == (
        "waiting: waits: needs 11.0 GiB on host, 9.0 GiB free, and memory of what just ended may be on its way back"
    )
    assert scene.plan().wake_at == NOW - 1 + RELEASE_TIME


def test_it_is_waited_for_no_longer_than_memory_may_take() -> None:
    assert late(ago=RELEASE_TIME).does() == ["start small-1"]


def test_one_that_could_not_fit_even_then_keeps_nobody_waiting() -> None:
    scene = late(ago=1).offers("large", offer(12.9))
    assert scene.does() == ["start small-1"]
    pinned = late(ago=1).has(view("base-1", 3, spec=spec("base", pinned=True)))
    pinned.models[ModelName("base")] = spec("base", pinned=True)
    assert "start small-1" in pinned.does()


def test_an_old_instance_on_another_device_serves_on_while_others_make_room() -> None:
    """Of a model with a new config that needs the second card, while the old one ran on the first."""
    old = on(ONE, "a-1", 6, fingerprint="old", ready_at=Instant(950))
    other = on(TWO, "b-1", 20, ready_at=Instant(950))
    specs = (spec("a", devices=("1",)), spec("b"))
    answer = decide(specs, {"a": offer(8), "b": offer(20)}, old, other, waiting="a")
    assert done(answer) == ["StopInstance b-1"]


def test_an_old_instance_on_the_same_device_leaves_with_the_others() -> None:
    old = on(TWO, "a-1", 6, fingerprint="old", ready_at=Instant(950))
    other = on(TWO, "b-1", 14, ready_at=Instant(950))
    specs = (spec("a", devices=("1",)), spec("b"))
    answer = decide(specs, {"a": offer(21), "b": offer(14)}, old, other, waiting="a")
    assert done(answer) == ["StopInstance a-1", "StopInstance b-1"]


@pytest.mark.parametrize(("ago", "actions"), [(7, []), (8, ["StopInstance b-1"])])
def test_an_idle_instance_stays_for_as_long_as_its_load_took(ago: float, actions: list[str]) -> None:
    ready = Instant(NOW - ago)
    busy = [on(device, f"{name}-1", 20, ready_at=ready, started_at=Instant(ready - 8)) for device, name in ((ONE, "b"), (TWO, "c"))]
    pinned = replace(busy[1], spec=spec("c", pinned=True))
    specs = (spec("a"), spec("b"), spec("c", pinned=True))
    answer = decide(specs, {"a": offer(8), "b": offer(20), "c": offer(20)}, busy[0], pinned, waiting="a")
    assert done(answer) == actions
    assert actions or answer.wake_at == ready + 8


def test_while_gpus_cannot_be_read_nobody_is_evicted_or_sent_to_the_cpu() -> None:
    answer = decide((spec("a"), spec("b")), {"a": offer(8), "b": offer(20)}, on(ONE, "b-1", 20), waiting="a", seen=False)
    assert answer.actions == ()
    assert answer.decisions[ModelName("a")].sentence == "waits: needs 8.0 GiB, and the driver does not answer"


def test_gpu_memory_of_an_ended_instance_stays_promised_until_it_is_seen_to_be_free() -> None:
    gone = on(ONE, "b-1", 20, state=InstanceState.EXITED, since=Instant(NOW - 3), unreleased={ONE: gib(20)})
    specs = (spec("a", devices=("0",)), spec("b"))
    offers = {"a": offer(8), "b": offer(20)}
    answer = decide(specs, offers, gone, waiting="a")
    assert answer.actions == ()
    assert answer.wake_at == NOW - 3 + RELEASE_TIME
    assert done(decide(specs, offers, replace(gone, since=Instant(NOW - RELEASE_TIME)), waiting="a")) == ["ForgetInstance b-1"]


def test_exits_of_other_models_are_no_reason_to_keep_anything_when_all_fits() -> None:
    record: ExitRecord = ended("small-1", 1)
    scene = Scene(spec("small")).offers("small", offer(4, "other")).wait("small").had(record)
    assert scene.does() == ["start small-1"]
