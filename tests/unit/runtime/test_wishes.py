"""The book of what was asked for by hand: one wish per model, told when it has come true, and over when the config is applied."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from offloadd.errors import RequestError
from offloadd.runtime.wishes import WishBook
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.demand import Demand
from offloadd.state.ids import ModelName
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import Instant
from tests.unit.plan.build import view

A = ModelName("a")


@dataclass
class World:
    time: float = 1000.0
    wakes: list[float] = field(default_factory=list)

    def now(self) -> Instant:
        return Instant(self.time)

    def wall(self) -> float:
        return self.time

    def wake(self) -> None:
        self.wakes.append(self.time)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def book(world: World) -> WishBook:
    return WishBook(clock=world, wake=world.wake, newest=lambda _: 1)


def plan(state: ModelState, sentence: str = "so it is") -> Plan:
    return Plan(decisions={A: Decision(model=A, state=state, sentence=sentence)})


NOBODY = ObservedState()


async def begun(task: asyncio.Task[Decision]) -> asyncio.Task[Decision]:
    await asyncio.sleep(0)
    return task


def test_to_load_again_is_the_same_wish_and_forgives_again(world: World, book: WishBook) -> None:
    book.load(A)
    world.time += 10
    book.load(A)
    demand = book.join(Demand())
    assert (demand.wishes[A].since, demand.forgiven[A]) == (1000.0, 1010.0)
    book.unload(A)
    assert not book.join(Demand()).wishes[A].load
    assert len(world.wakes) == 3


def test_a_config_ends_every_wish_and_keeps_what_was_forgiven_of_its_models(book: WishBook) -> None:
    book.load(A)
    book.load(ModelName("gone"))
    book.yield_to_config({A})
    demand = book.join(Demand())
    assert demand.wishes == {}
    assert list(demand.forgiven) == [A]


async def test_it_waits_through_plans_until_the_model_is_ready(book: WishBook) -> None:
    book.load(A)
    waiting = await begun(asyncio.create_task(book.until_loaded(A)))
    for state in (ModelState.WAITING, ModelState.STARTING, ModelState.LOADING):
        book.told(plan(state), NOBODY)
        await asyncio.sleep(0)
        assert not waiting.done()
    book.told(plan(ModelState.READY), NOBODY)
    assert (await waiting).state is ModelState.READY


async def test_what_cannot_be_loaded_is_said_with_the_reason(book: WishBook) -> None:
    book.load(A)
    waiting = await begun(asyncio.create_task(book.until_loaded(A)))
    book.told(plan(ModelState.FAILED, "its file is damaged"), NOBODY)
    with pytest.raises(RequestError, match="its file is damaged"):
        await waiting


async def test_to_unload_waits_for_those_that_ran_and_not_for_later_ones(book: WishBook) -> None:
    book.unload(A)
    waiting = await begun(asyncio.create_task(book.until_unloaded(A)))
    old, new = view("a-1", 1, InstanceState.STOPPING), view("a-2", 1, started_at=Instant(1001.0))
    book.told(plan(ModelState.STOPPING), ObservedState(instances={old.id: old, new.id: new}))
    await asyncio.sleep(0)
    assert not waiting.done()
    book.told(plan(ModelState.READY), ObservedState(instances={new.id: new}))
    await waiting


@pytest.mark.parametrize("config", [True, False])
async def test_who_waits_for_a_wish_that_is_no_more_is_told(book: WishBook, config: bool) -> None:
    book.load(A)
    waiting = await begun(asyncio.create_task(book.until_loaded(A)))
    if config:
        book.yield_to_config({A})
    else:
        book.unload(A)
    book.told(plan(ModelState.OFF), NOBODY)
    with pytest.raises(RequestError, match="config was applied" if config else "unloaded by hand") as refused:
        await waiting
    assert refused.value.status == 409


async def test_many_wait_for_one_load(book: WishBook) -> None:
    book.load(A)
    waiting = [await begun(asyncio.create_task(book.until_loaded(A))) for _ in range(50)]
    book.told(plan(ModelState.READY), NOBODY)
    assert {(await each).state for each in waiting} == {ModelState.READY}
