"""A request that waits: its client is shown a sign of life and told when to come back, and the reason is told to whoever asks."""

from __future__ import annotations

import asyncio

import pytest

from offloadd.errors import RequestError
from offloadd.proxy import leases
from offloadd.proxy.leases import LeaseBook
from offloadd.state.actions import Decision, ModelState
from offloadd.state.desired import ModelSpec, QueueLimits
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.units import Seconds
from tests.unit.proxy.test_leases import NAME, SPEC, World

LOADING = Decision(model=NAME, state=ModelState.LOADING, sentence="a-1 is loading", ready_in=Seconds(42.0))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def book(world: World, told: list[str]) -> LeaseBook:
    return LeaseBook(
        clock=world,
        hosts=world.hosts,
        decision=lambda _: world.decision,
        wake=world.wake,
        waits=lambda model, why: told.append(f"{model}: {why}"),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "KEEPALIVE", Seconds(0.01))


async def test_it_is_called_while_it_waits_and_no_more_when_it_is_granted(world: World, book: LeaseBook) -> None:
    signs: list[float] = []
    twice = asyncio.Event()

    async def sign(waited: Seconds) -> None:
        signs.append(waited)
        if len(signs) == 2:
            twice.set()

    waiting = asyncio.create_task(book.acquire(SPEC, while_waiting=sign))
    await twice.wait()
    world.slots = {1: 1}
    book.serve_all()
    lease = await waiting
    count = len(signs)
    await asyncio.sleep(0.05)
    assert len(signs) == count
    book.release(lease)


async def test_a_client_that_takes_no_bytes_does_not_hold_its_grant_up(world: World, book: LeaseBook) -> None:
    stuck = asyncio.Event()

    async def never(_: Seconds) -> None:
        stuck.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(book.acquire(SPEC, while_waiting=never))
    await stuck.wait()
    world.slots = {1: 1}
    book.serve_all()
    book.release(await asyncio.wait_for(waiting, 10))


async def test_a_client_that_is_gone_leaves_the_queue(book: LeaseBook) -> None:
    async def gone(_: Seconds) -> None:
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        await book.acquire(SPEC, while_waiting=gone)
    assert book.demand().waiting == {}


async def test_who_is_refused_or_waits_in_vain_is_told_when_it_will_be_ready(world: World, book: LeaseBook) -> None:
    world.decision = LOADING
    short = ModelSpec(
        name=NAME, source="x.gguf", backends=(BackendName("llamacpp"),), queue=QueueLimits(max_waiting=1, max_wait=Seconds(0.05))
    )
    first = asyncio.create_task(book.acquire(short))
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as full:
        await book.acquire(short)
    assert (full.value.status, full.value.retry_after) == (429, 42.0)
    with pytest.raises(RequestError) as late:
        await first
    assert (late.value.status, late.value.retry_after) == (504, 42.0)


async def test_a_full_queue_before_a_ready_instance_says_the_usual(world: World, book: LeaseBook) -> None:
    world.slots, world.decision = {1: 1}, LOADING
    one = ModelSpec(name=NAME, source="x.gguf", backends=(BackendName("llamacpp"),), queue=QueueLimits(max_waiting=1))
    lease = await book.acquire(one)
    second = asyncio.create_task(book.acquire(one))
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as full:
        await book.acquire(one)
    assert full.value.retry_after == 5.0
    book.release(lease)
    book.release(await second)


async def test_each_wait_is_told_with_its_reason(world: World, book: LeaseBook, told: list[str]) -> None:
    world.decision = LOADING
    waiting = asyncio.create_task(book.acquire(SPEC))
    await asyncio.sleep(0)
    assert told == ["a: a-1 is loading"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_an_instance_is_idle_since_its_last_request_ended_until_it_is_forgotten(world: World, book: LeaseBook) -> None:
    key = InstanceId(LOCAL, ModelName("a"), 1)
    world.slots = {1: 2}
    first, second = await book.acquire(SPEC), await book.acquire(SPEC)
    assert book.demand().idle_since == {}
    book.release(first)
    assert book.demand().idle_since == {}
    world.time += 5
    book.release(second)
    assert book.demand().idle_since == {key: 105.0}
    third = await book.acquire(SPEC)
    assert book.demand().idle_since == {}
    book.release(third)
    book.forget(key)
    assert book.demand().idle_since == {}
