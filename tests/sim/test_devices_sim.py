"""The planner on machines with GPUs, drawn and crafted: several memories, people who borrow, and all that goes wrong with them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from offloadd.plan.room import FAIR_WAIT, LONGEST_STAY
from offloadd.state.actions import DrainInstance, StopInstance
from offloadd.state.desired import DesiredState, RunMode
from offloadd.state.ids import LOCAL, DeviceId, ModelName
from offloadd.state.observed import InstanceState
from tests.sim import faults
from tests.sim.device_properties import no_memory_is_overdrawn_unless_others_took_what_was_promised as never_overdrawn
from tests.sim.drive_devices import DEVICE_EDITS, LOANS, DeviceDriver, draw_world, show_world
from tests.sim.machine import GIB, Card, gpu
from tests.sim.properties import check_cycle, every_request_ended, faults_stop_and_the_world_settles
from tests.sim.step import Step, is_eviction
from tests.sim.test_planner_sim import LONG, MODELS, Planner, pass_time
from tests.sim.world import Request, Shape, World, spec

SEEDS = (8, 13, 14, 36, 47, 59, 65, 91, 128, 155, 706, 829)
"""Seeds that once found a fault of the planner, of a property or of this world."""
GPU0, GPU1 = (DeviceId(LOCAL, f"GPU-{index}") for index in range(2))
LAYERED = Shape(layers=24, fixed=0.5)


class Devices(Planner):
    """All that can happen to a machine without GPUs, and what can happen to one with up to four."""

    @initialize(seed=st.integers(0, 2**16))
    def a_machine_is_drawn(self, seed: int) -> None:
        self.world = draw_world(seed)

    def card(self, index: int) -> Card:
        cards = list(self.world.machine.cards.values())
        return cards[index % len(cards)]

    @rule(model=MODELS, changes=st.sampled_from(DEVICE_EDITS))
    def the_config_moves_a_model(self, model: ModelName, changes: dict[str, object]) -> None:
        self.world.edit(self.named(model), **changes)

    @precondition(lambda self: len(self.world.loans) < 4)
    @rule(gib=st.sampled_from(LOANS), device=st.sampled_from(("auto", "host", "0", "GPU-1")), named=st.booleans())
    def somebody_asks_for_a_loan(self, gib: float, device: str, named: bool) -> None:
        self.world.borrow(gib, device, named=named)

    @rule(index=st.integers(0, 3))
    def a_loan_is_given_back_or_waited_for_no_longer(self, index: int) -> None:
        faults.end_a_loan(self.world, index)

    @rule(index=st.integers(0, 4), gib=st.sampled_from((0.0, 1.0, 8.0)), polite=st.booleans())
    def other_programs_use_a_device(self, index: int, gib: float, polite: bool) -> None:
        faults.foreign_memory(self.world, gib, self.card(index).id, polite=polite)

    @rule(index=st.integers(0, 4))
    def the_reading_of_a_device_fails(self, index: int) -> None:
        faults.lose_device(self.world, self.card(index).id)

    @rule()
    def the_driver_does_not_answer(self) -> None:
        faults.lose_driver(self.world)

    @rule()
    def memory_is_released_later_than_anybody_waits(self) -> None:
        faults.slow_release(self.world, 15.0)


TestDevices = Devices.TestCase
TestDevices.settings = settings(
    max_examples=1500 if LONG else 100,
    stateful_step_count=60 if LONG else 30,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
)
if LONG:
    TestDevices.pytestmark = [pytest.mark.timeout(3600)]


@pytest.mark.timeout(3600 if LONG else 120)
def test_many_machines_keep_every_property() -> None:
    ended: Counter[str] = Counter()
    for seed in range(200, 1200) if LONG else range(200, 204):
        print(f"seed {seed}")  # shown when it fails
        driver = DeviceDriver(seed)
        driver.run(600, replan_every=6, calm_every=300)
        ended.update(driver.world.ended)
    assert ended["done"] > 100


@pytest.mark.parametrize("seed", SEEDS)
def test_a_machine_that_once_failed_keeps_every_property(seed: int) -> None:
    DeviceDriver(seed).run(400 if LONG else 150, replan_every=4, calm_every=200)


# Crafted machines


def on_gpus(sizes: dict[str, float], *gpus: float, shape: Shape = LAYERED, ram: float = 64.0, **fields: object) -> World:
    """On-demand models of these sizes, in GiB, on GPUs of these sizes."""
    specs = [spec(name, context=0, **fields) for name in sizes]
    return World(
        DesiredState(models={one.name: one for one in specs}),
        {ModelName(name): size for name, size in sizes.items()},
        total=ram,
        gpus=[gpu(index, size) for index, size in enumerate(gpus)],
        shapes={ModelName(name): shape for name in sizes},
    )


def ask(world: World, name: str, runs_for: float = 1.0) -> Request:
    return world.arrive(ModelName(name), runs_for=runs_for)


def where(world: World, name: str) -> dict[str, int]:
    """Layers by device of the model's only instance, or 0 where they are not counted."""
    (process,) = (one for one in world.processes.values() if one.id.model == name)
    split = process.placement.split or (0,)
    return {device.name: count for device, count in zip(process.placement.gpus, split, strict=True)}


def test_a_model_too_large_for_one_gpu_is_divided_and_served() -> None:
    world = on_gpus({"large": 30.0}, 24.0, 24.0)
    asked = ask(world, "large")
    pass_time(world, 20)
    assert asked.end == "done"
    assert where(world, "large") == {"GPU-0": 12, "GPU-1": 12}


def test_a_large_model_over_two_gpus_is_served_within_a_bound_while_small_ones_stay_in_demand() -> None:
    world = on_gpus({"a": 9.0, "b": 9.0, "large": 36.0}, 24.0, 24.0)
    pass_time(world, 1)
    asked: Request | None = None
    for half in range(180):
        ask(world, "a", 0.6)
        if half % 6 == 0:
            ask(world, "b", 6.0)
        if half == 30:
            asked = ask(world, "large")
        pass_time(world, 0.5)
    assert asked is not None
    assert asked.granted_at is not None
    assert asked.granted_at - asked.arrived < FAIR_WAIT + 6 + 1 + 6  # what runs, TERM and release, load


def swaps_per_minute(load: float) -> float:
    """Two models of which only one fits, both wanted all the time."""
    world = on_gpus({"a": 16.0, "b": 16.0}, 24.0)
    for name in ("a", "b"):
        faults.loads_in(world, ModelName(name), load)
    minutes = 5
    for _ in range(minutes * 60):
        for name in ("a", "b"):
            if not world.waiting.get(ModelName(name)):
                ask(world, name, 0.3)
        pass_time(world, 1.0)
    return (sum(world.launches.values()) - 1) / minutes


@pytest.mark.parametrize("load", [1.0, 8.0])
def test_two_models_in_turn_do_not_spend_their_time_on_loading(load: float) -> None:
    """Each stays at least as long as its load took, so at most half the time goes into loads."""
    assert 0 < swaps_per_minute(load) <= 60 / (2 * load)


def test_gpus_that_cannot_be_read_stop_nobody_and_send_nobody_to_the_cpu() -> None:
    world = on_gpus({"a": 6.0, "b": 6.0}, 24.0)
    ask(world, "a")
    pass_time(world, 20)
    faults.lose_driver(world)
    asked = ask(world, "b")
    served = ask(world, "a")
    pass_time(world, 60)
    assert (served.end, asked.end) == ("done", "")
    assert [process.state for process in world.processes.values()] == [InstanceState.READY]
    faults.see_again(world)
    pass_time(world, 20)
    assert asked.end == "done"


def test_when_one_of_two_gpus_is_lost_the_other_serves_on() -> None:
    world = on_gpus({"a": 16.0, "b": 16.0}, 24.0, 24.0)
    for name in ("a", "b"):
        ask(world, name)
    pass_time(world, 20)
    faults.lose_device(world, GPU0)
    served = [ask(world, name) for name in ("a", "b")]
    pass_time(world, 20)
    assert [request.end for request in served] == ["done", "done"]
    assert world.launches == {"a": 1, "b": 1}


def test_memory_that_comes_back_after_a_while_is_waited_for() -> None:
    world = on_gpus({"a": 16.0, "b": 16.0}, 24.0)
    faults.slow_release(world, 6.0)
    ask(world, "a")
    pass_time(world, 30)
    asked = ask(world, "b")
    pass_time(world, 30)
    assert asked.granted_at is not None
    assert 6.0 + 5.0 < asked.granted_at - asked.arrived < 6.0 + 5.0 + 2.0  # release, load


def test_memory_that_does_not_come_back_is_taken_for_somebody_elses_after_a_while() -> None:
    world = on_gpus({"a": 16.0, "b": 16.0, "c": 6.0}, 24.0)
    faults.slow_release(world, 100_000.0)
    ask(world, "a")
    pass_time(world, 30)
    asked = ask(world, "b")
    pass_time(world, 30)
    assert not asked.end
    assert not world.processes
    small = ask(world, "c")
    pass_time(world, 30)
    assert small.end == "done"


def test_a_loan_has_idle_models_leave_and_they_come_back_when_it_is_over() -> None:
    world = on_gpus({"a": 14.0}, 24.0, run=RunMode.ALWAYS)
    pass_time(world, 20)
    loan = world.borrow(16.0)
    pass_time(world, 20)
    assert world.loans[loan].granted == {GPU0: 16 * GIB}
    assert not world.processes
    world.give_back(loan)
    pass_time(world, 20)
    assert where(world, "a") == {"GPU-0": 0}


def test_a_loan_waits_for_a_pinned_model_for_as_long_as_it_stays_and_is_told_so() -> None:
    world = on_gpus({"a": 14.0}, 24.0, run=RunMode.ALWAYS, pinned=True)
    pass_time(world, 20)
    loan = world.borrow(16.0)
    pass_time(world, 300)
    assert world.loans[loan].granted is None
    assert world.last_plan.loans[loan].endswith("and nothing may be evicted for it now")
    world.edit(ModelName("a"), pinned=False)
    pass_time(world, 20)
    assert world.loans[loan].granted == {GPU0: 16 * GIB}


def test_a_busy_model_is_drained_for_a_loan_after_a_fair_wait() -> None:
    world = on_gpus({"a": 14.0}, 24.0)
    request = ask(world, "a", 30.0)
    pass_time(world, 10)
    loan = world.borrow(16.0)
    pass_time(world, FAIR_WAIT - 1)
    assert [process.state for process in world.processes.values()] == [InstanceState.READY]
    pass_time(world, 30)
    assert request.end == "done"
    assert world.loans[loan].granted == {GPU0: 16 * GIB}


def test_a_loan_given_up_while_models_leave_for_it_lets_them_come_back() -> None:
    world = on_gpus({"a": 14.0}, 24.0, run=RunMode.ALWAYS)
    pass_time(world, 20)
    loan = world.borrow(16.0)
    check_cycle(world)
    world.give_back(loan)
    faults_stop_and_the_world_settles(world)
    assert where(world, "a") == {"GPU-0": 0}


def test_a_loan_that_nobody_can_have_disturbs_nobody() -> None:
    world = on_gpus({"a": 14.0}, 24.0)
    ask(world, "a")
    pass_time(world, 20)
    loan = world.borrow(30.0)
    pass_time(world, 60)
    assert world.last_plan.loans[loan] == "cannot be had: it needs 30.0 GiB on gpu0, more than its limit of 22.3 GiB"
    assert world.launches == {"a": 1}
    assert [process.state for process in world.processes.values()] == [InstanceState.READY]


def test_what_lies_on_a_unified_gpu_lies_in_ram() -> None:
    world = on_gpus({"a": 20.0, "b": 8.0}, ram=32.0, shape=Shape(host=1.0))
    world.machine.cards[GPU0] = gpu(0, 32.0, unified=True)
    world.edit(ModelName("b"), devices="cpu")
    first = ask(world, "a", 20.0)
    pass_time(world, 10)
    second = ask(world, "b")
    pass_time(world, 10)
    assert first.instance is not None
    assert not second.end  # 21 of 25.6 GiB that RAM gives are promised
    pass_time(world, 60)
    assert second.end == "done"


# Show 2: ten minutes of virtual time


def show(seed: int) -> str:
    """Random requests for eight models on two GPUs, with other programs on both for a while; a line about the run."""
    mix = random.Random(seed)
    world = show_world()
    names = list(world.desired.models)
    end = world.now + 600
    shocks = {150: (GPU0, 9.0), 250: (GPU1, 3.0), 350: (GPU0, 0.0), 450: (GPU1, 0.0)}
    asked: list[Request] = []
    evictions = 0
    next_at = world.now
    while world.now < end:
        for at in [at for at in shocks if world.now >= end - 600 + at]:
            device, size = shocks.pop(at)
            faults.foreign_memory(world, size, device, polite=True)
        if world.now >= next_at:
            asked.append(ask(world, mix.choice(names), mix.choice((0.5, 2.0, 8.0))))
            next_at = world.now + mix.expovariate(1 / 4.0)
        step = check_cycle(world, replan=False)
        check_promises(step)
        evictions += sum(is_eviction(action) for action in step.plan.actions if isinstance(action, StopInstance | DrainInstance))
        world.advance(max(1e-3, min(next_at, end) - world.now) if not step.plan.actions else 0.05)
    faults_stop_and_the_world_settles(world)
    every_request_ended(world)
    done = [request for request in asked if request.end == "done"]
    waits = {name: max((wait(r) for r in done if r.model == name), default=0.0) for name in names}
    assert len(done) == len(asked), Counter(request.end for request in asked)
    assert waits["m20"] <= BOUND, waits
    return (
        f"show 2, seed {seed}: {len(asked)} requests, all served; {sum(world.launches.values())} loads, {evictions} evictions; "
        f"longest wait {max(waits.values()):.1f} s, of the largest model {waits['m20']:.1f} s"
    )


BOUND = FAIR_WAIT + 8 + LONGEST_STAY + 1 + 5
"""For the largest model: what runs, the stay of one that was just loaded, TERM and release, its own load."""


def wait(request: Request) -> float:
    assert request.granted_at is not None
    return request.granted_at - request.arrived


def check_promises(step: Step) -> None:
    """Unlike in other runs here, others never take promised memory: so promises hold whether or not anything is planned."""
    never_overdrawn(step)
    for device, account in step.plan.accounts.items():
        assert account.reserved + step.new_on(device) <= account.limit
        assert step.world.machine.balance(device) >= step.world.due(device)


@pytest.mark.parametrize("seed", range(40) if LONG else (1, 2))
def test_show_2_ten_minutes_of_random_requests_on_two_gpus(seed: int) -> None:
    print(show(seed))
