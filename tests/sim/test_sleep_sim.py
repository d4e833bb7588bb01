"""Models that sleep instead of being stopped, on machines with GPUs, under everything that can go wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from offloadd.plan import draft, sleep
from offloadd.state.desired import DesiredState, RunMode
from offloadd.state.ids import LOCAL, DeviceId, ModelName
from offloadd.state.launch import ExitKind
from offloadd.state.observed import InstanceState
from offloadd.units import Bytes, Seconds
from tests.sim import faults
from tests.sim.drive_devices import DeviceDriver
from tests.sim.machine import GIB, gpu
from tests.sim.properties import Broken
from tests.sim.test_planner_sim import pass_time
from tests.sim.world import Impossible, Nap, Process, Request, Shape, World, spec, states

LONG = os.environ.get("OFFLOADD_SIM") == "long"
GPU = DeviceId(LOCAL, "GPU-0")
NAPS = (Nap.WELL, Nap.WELL, *Nap)
SEEDS = (13,)
"""Seeds that once found a fault of the planner or of this world."""


def sleepy_world(sizes: dict[str, float], *gpus: float, asleep: float = 1.0, **fields: object) -> World:
    """On-demand models of these sizes that can sleep, in GiB, on GPUs of these sizes."""
    specs = [spec(name, context=0, idle_timeout=Seconds(20), **fields) for name in sizes]
    return World(
        DesiredState(models={one.name: one for one in specs}),
        {ModelName(name): size for name, size in sizes.items()},
        total=64.0,
        gpus=[gpu(index, size) for index, size in enumerate(gpus)],
        shapes={ModelName(name): Shape(host=1.0, asleep=asleep) for name in sizes},
    )


class SleepDriver(DeviceDriver):
    """A drawn machine on which most models can sleep, and do so well or badly."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        for name in ("tiny", "small", "twin", "large", "vast"):
            if self.mix.random() < 0.8:
                model = ModelName(name)
                self.world.shapes[model] = replace(self.world.shapes[model], asleep=self.mix.choice((0.1, 0.4, 1.5)))
                if self.mix.random() < 0.4:
                    faults.sleep_so(self.world, model, self.mix.choice(NAPS))
        self.slept: Counter[InstanceState] = Counter()

    def step(self) -> None:
        self.slept.update(process.state for process in self.world.processes.values())
        if self.mix.random() < 0.03:
            faults.sleep_so(self.world, self._model(), self.mix.choice(NAPS))
        super().step()


@pytest.mark.timeout(3600 if LONG else 120)
def test_many_machines_with_sleepers_keep_every_property() -> None:
    ended: Counter[str] = Counter()
    slept: Counter[InstanceState] = Counter()
    for seed in range(1000) if LONG else range(4):
        print(f"seed {seed}")  # shown when it fails
        driver = SleepDriver(seed)
        driver.run(600, replan_every=6, calm_every=300)
        ended.update(driver.world.ended)
        slept.update(driver.slept)
    assert ended["done"] > 100
    assert min(slept[state] for state in (InstanceState.FALLING_ASLEEP, InstanceState.SLEEPING, InstanceState.WAKING)) > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_a_machine_with_sleepers_that_once_failed_keeps_every_property(seed: int) -> None:
    SleepDriver(seed).run(600 if LONG else 300, replan_every=4, calm_every=300)


# Crafted machines


def ask(world: World, name: str, runs_for: float = 1.0) -> Request:
    return world.arrive(ModelName(name), runs_for=runs_for)


def only(world: World, name: str) -> Process:
    (process,) = (one for one in world.processes.values() if one.id.model == name)
    return process


def held(world: World) -> float:
    """GiB that the GPU's processes really hold."""
    return sum(sizes.get(GPU, 0) for sizes in world.machine.held.values()) / GIB


def asleep_after_use(world: World, name: str) -> Process:
    asked = ask(world, name)
    pass_time(world, 40)
    assert asked.end == "done"
    process = only(world, name)
    assert process.state is InstanceState.SLEEPING
    return process


def test_an_idle_one_sleeps_with_what_it_holds_and_wakes_for_the_next_request() -> None:
    world = sleepy_world({"a": 10.0}, 24.0)
    process = asleep_after_use(world, "a")
    assert process.placement.reserved[GPU] == GIB
    assert held(world) == 0.75
    assert states(world)[ModelName("a")] == "sleeping"
    said = world.last_plan.decisions[ModelName("a")].sentence
    assert said == "a-1 sleeps on alpha with 2.0 GiB, and needs 9.0 GiB more to wake: no request wants it"
    again = ask(world, "a")
    pass_time(world, 4)
    assert (again.end, only(world, "a")) == ("done", process)
    assert process.placement.reserved[GPU] == 10 * GIB


def test_two_that_do_not_fit_together_take_turns_asleep() -> None:
    world = sleepy_world({"a": 16.0, "b": 16.0}, 24.0)
    first = ask(world, "a")
    pass_time(world, 10)
    second = ask(world, "b")
    pass_time(world, 12)
    assert (first.end, second.end) == ("done", "done")
    assert [only(world, name).state for name in "ab"] == [InstanceState.SLEEPING, InstanceState.READY]
    third = ask(world, "a")
    pass_time(world, 8)  # one load takes five seconds, and there is none any more
    assert third.end == "done"
    assert [only(world, name).id.number for name in "ab"] == [1, 1]


def test_a_sleeper_leaves_when_even_what_it_holds_asleep_is_needed() -> None:
    world = sleepy_world({"a": 10.0, "b": 22.0}, 24.0, asleep=2.0)
    asleep_after_use(world, "a")
    asked = ask(world, "b")
    pass_time(world, 30)
    assert asked.end == "done"
    assert [process.id.model for process in world.processes.values()] == ["b"]


@pytest.mark.parametrize("nap", [Nap.KEEPS, Nap.REFUSES, Nap.SILENT])
def test_one_that_does_not_give_its_memory_back_is_stopped_and_not_put_to_sleep_again(nap: Nap) -> None:
    world = sleepy_world({"a": 10.0}, 24.0)
    faults.sleep_so(world, ModelName("a"), nap)
    for _ in range(2):
        asked = ask(world, "a")
        pass_time(world, 120)
        assert asked.end == "done"
        assert not world.processes
    kinds = [record.cause.kind for record in world.exits[ModelName("a")]]
    assert kinds == [ExitKind.SLEEPLESS, ExitKind.STOPPED]


@pytest.mark.parametrize("nap", [Nap.LOST, Nap.LATE])
def test_one_that_does_not_wake_is_replaced_by_a_fresh_start(nap: Nap) -> None:
    world = sleepy_world({"a": 10.0}, 24.0, start_timeout=Seconds(15))
    faults.sleep_so(world, ModelName("a"), nap)
    asleep_after_use(world, "a")
    asked = ask(world, "a")
    pass_time(world, 30)
    assert asked.end == "done"
    assert only(world, "a").id.number == 2


def test_one_that_cannot_wake_where_it_is_is_started_elsewhere() -> None:
    world = sleepy_world({"a": 16.0, "b": 16.0}, 24.0, 20.0)
    process = asleep_after_use(world, "a")
    assert process.placement.gpus == (DeviceId(LOCAL, "GPU-1"),)  # the best fit
    faults.foreign_memory(world, 12.0, DeviceId(LOCAL, "GPU-1"))
    asked = ask(world, "a")
    pass_time(world, 30)
    assert asked.end == "done"
    assert only(world, "a").placement.gpus == (GPU,)


def test_a_busy_one_is_never_put_to_sleep_and_one_that_runs_always_wakes_by_itself() -> None:
    world = sleepy_world({"a": 16.0, "b": 16.0}, 24.0)
    world.edit(ModelName("a"), run=RunMode.ALWAYS, priority=40)
    pass_time(world, 20)
    busy = ask(world, "a", runs_for=30)
    asked = ask(world, "b")
    pass_time(world, 8)
    assert (busy.end, asked.end) == ("", "")
    assert only(world, "a").state is InstanceState.READY
    pass_time(world, 80)
    assert (busy.end, asked.end) == ("done", "done")
    assert only(world, "a").state is InstanceState.READY


def test_a_sleeper_is_adopted_asleep_with_no_more_than_it_holds() -> None:
    world = sleepy_world({"a": 10.0}, 24.0)
    process = asleep_after_use(world, "a")
    faults.kill_the_daemon(world, forgets=False)
    pass_time(world, 30)
    assert (only(world, "a"), process.state) == (process, InstanceState.SLEEPING)
    assert process.placement.reserved[GPU] == GIB
    asked = ask(world, "a")
    pass_time(world, 4)
    assert asked.end == "done"


def test_a_lost_reading_ends_nobody_who_falls_asleep() -> None:
    world = sleepy_world({"a": 10.0}, 24.0)
    ask(world, "a")
    pass_time(world, 8)
    until = world.now + 60
    while only(world, "a").state is not InstanceState.FALLING_ASLEEP and world.now < until:
        pass_time(world, 0.2)
    faults.lose_driver(world)
    pass_time(world, 60)
    assert only(world, "a").state is InstanceState.FALLING_ASLEEP
    assert only(world, "a").placement.reserved[GPU] == 10 * GIB
    faults.see_again(world)
    pass_time(world, 1)
    assert only(world, "a").state is InstanceState.SLEEPING


# The properties are worth something


def a_sleeper_is_believed_by_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep, "held_asleep", lambda made, view, since: dict.fromkeys(view.placement.asleep, Bytes(0)))


def waking_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    real = draft.Draft.rouse

    def careless(self: draft.Draft, view: object, why: str) -> None:
        room = dict(self.ledger.room)
        real(self, view, why)  # type: ignore[arg-type]
        self.ledger.room = room

    monkeypatch.setattr(draft.Draft, "rouse", careless)


def busy_ones_are_put_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft.Draft, "leases", lambda self, view: 0)


def a_sleepless_one_is_put_to_sleep_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep, "_sleepless", lambda made, view: False)


def any_machine() -> None:
    for seed in range(6):
        SleepDriver(seed).run(300, replan_every=1000, calm_every=1000)


def two_sleepers_wanted_at_once() -> None:
    world = sleepy_world({"a": 12.0, "b": 12.0}, 24.0)
    for name in "ab":
        asleep_after_use(world, name)
    for name in "ab":
        ask(world, name)
    pass_time(world, 5)


def one_that_keeps_its_memory() -> None:
    test_one_that_does_not_give_its_memory_back_is_stopped_and_not_put_to_sleep_again(Nap.KEEPS)


@pytest.mark.parametrize(
    ("fault", "where", "caught"),
    [
        (a_sleeper_is_believed_by_its_word, one_that_keeps_its_memory, "a_promise_is_lowered_only_when_the_memory_is_really_back"),
        (
            waking_takes_no_room,
            two_sleepers_wanted_at_once,
            "reserved_memory_stays_within_each_devices_limit_releasing_included",
        ),
        (busy_ones_are_put_to_sleep, any_machine, ""),
        (a_sleepless_one_is_put_to_sleep_again, one_that_keeps_its_memory, "only_one_that_is_ready_and_idle_is_put_to_sleep"),
    ],
)
@pytest.mark.timeout(300)
def test_a_fault_of_the_planner_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], where: Callable[[], None], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises((Broken, Impossible)) as found:
        where()
    assert not caught or (isinstance(found.value, Broken) and found.value.name == caught)
