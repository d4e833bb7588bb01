"""A plan, and a change of an instance, reach everybody, in an order that lets nobody see half of it."""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.effects import Effects
from offloadd.state.actions import ForgetInstance, Plan
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId
from offloadd.state.launch import Endpoint, Placement
from offloadd.state.observed import InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes
from tests.fakes.parts import Part
from tests.unit.plan.build import ended, key, view

ONE = key("a-1")
GPU = DeviceId(LOCAL, "GPU-1")
PLANNED = ["loans.refuse", "warmer.follow", "service.changed", "book.serve_all", "wishes.told"]
CHANGED = ["hosts.changed", "rounds.stir", "book.serve_all"]


class World:
    """One instance, or none; `told` is who heard of it, `noted` what the registry was told."""

    def __init__(self, one: InstanceView | None = None) -> None:
        self.told: list[str] = []
        self.noted: list[tuple[InstanceView, Any]] = []
        told = self.told
        instance = None if one is None else Part("instance", [], view=one)
        if instance is not None:
            instance.source_size = Bytes(5)
        observed = ObservedState(exits={ONE.model: (ended("a-0", 5), ended("a-1", 1))})
        executor = Part("executor", [], get=instance, observed=observed, apply=lambda _: told.append("executor.apply"))
        observer = Part("observer", told)
        observer.holdings = Part("holdings", [], peak_of={HOST_RAM: Bytes(7)})
        parts: dict[str, Any] = {
            name: Part(name, told) for name in ("hosts", "book", "pool", "rounds", "loans", "warmer", "wishes")
        }
        self.effects = Effects(
            executor=executor,
            service=Part("service", told),
            observer=observer,
            chronicle=Part("chronicle", [], note=lambda seen, _, ends: self.noted.append((seen, ends))),
            wake=lambda: told.append("wake"),
            **parts,
        )


async def test_a_plan_is_begun_before_anybody_hears_of_it() -> None:
    world = World()
    world.effects.apply(Plan(actions=(ForgetInstance(instance=ONE),)))
    assert world.told == ["executor.apply", "hosts.changed", "rounds.stir", *PLANNED]


async def test_a_plan_that_does_nothing_stirs_nobody() -> None:
    world = World()
    world.effects.apply(Plan())
    assert world.told == ["executor.apply", *PLANNED]


async def test_a_plan_may_ask_for_a_reading() -> None:
    world = World()
    world.effects.apply(Plan(read_now=True))
    assert world.told == ["executor.apply", *PLANNED, "rounds.read_now"]


async def test_a_change_is_told_and_planned_for() -> None:
    world = World(view("a-1", 1))
    world.effects.changed(ONE)
    assert world.told == [*CHANGED, "wake"]
    ((seen, ends),) = world.noted
    assert (seen.id, seen.peak, ends) == (ONE, {HOST_RAM: 7}, ())


async def test_an_end_is_told_to_the_registry_with_its_cause() -> None:
    world = World(view("a-1", 1, InstanceState.EXITED))
    world.effects.changed(ONE)
    ((_, ends),) = world.noted
    assert [record.instance for record in ends] == [ONE]


async def test_memory_of_a_gpu_is_looked_at_when_who_holds_it_changes() -> None:
    world = World(view("a-1", 1, placement=Placement(reserved={GPU: Bytes(1)}, gpus=(GPU,))))
    world.effects.changed(ONE)
    assert world.told == [*CHANGED, "rounds.look_soon", "wake"]


async def test_nothing_is_kept_for_one_that_is_off_the_books() -> None:
    world = World()
    world.effects.changed(ONE)
    assert world.told == [*CHANGED, "book.forget", "wake"]
    assert world.noted == []


@pytest.mark.parametrize(("endpoint", "closed"), [(Endpoint(host="h", port=1), ["pool.forget"]), (None, [])])
async def test_requests_end_before_the_connections_they_might_take(endpoint: Endpoint | None, closed: list[str]) -> None:
    world = World(view("a-1", 1, endpoint=endpoint))
    world.effects.hang_up(ONE, "it stops", died=False)
    assert world.told == ["book.hang_up", *closed]
