"""Who gets a slot, who waits, and that no place is lost whatever the moment at which somebody leaves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from offloadd.errors import RequestError
from offloadd.plan.balance import EJECTED, FAILURES
from offloadd.proxy.lease import Host, Lease
from offloadd.proxy.leases import LeaseBook
from offloadd.state.actions import Decision, ModelState
from offloadd.state.desired import ModelSpec, QueueLimits
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint
from offloadd.units import Instant, Seconds

NAME = ModelName("a")
SPEC = ModelSpec(name=NAME, source="x.gguf", backends=(BackendName("llamacpp"),), queue=QueueLimits(max_waiting=2))


@dataclass
class World:
    """What the book sees of the rest."""

    time: float = 100.0
    slots: dict[int, int] = field(default_factory=dict)
    """Slots by number of the ready instance."""
    decision: Decision | None = None
    wakes: int = 0

    def now(self) -> Instant:
        return Instant(self.time)

    def wall(self) -> float:
        return self.time

    def hosts(self, model: ModelName) -> list[Host]:
        return [
            Host(
                instance=InstanceId(LOCAL, model, number),
                backend=BackendName("llamacpp"),
                endpoint=Endpoint(host="127.0.0.1", port=number),
                slots=slots,
                sign=lambda: None,
            )
            for number, slots in self.slots.items()
        ]

    def wake(self) -> None:
        self.wakes += 1


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def book(world: World) -> LeaseBook:
    return LeaseBook(clock=world, hosts=world.hosts, decision=lambda _: world.decision, wake=world.wake)


async def waits(book: LeaseBook, spec: ModelSpec = SPEC) -> asyncio.Task[Lease]:
    """A request that has begun to wait."""
    task = asyncio.create_task(book.acquire(spec))
    await asyncio.sleep(0)
    return task


def waiting(book: LeaseBook) -> int:
    found = book.demand().waiting.get(NAME)
    return found.count if found else 0


def held(book: LeaseBook) -> int:
    return sum(book.demand().leases.values())


async def test_a_free_slot_is_given_at_once(world: World, book: LeaseBook) -> None:
    world.slots = {1: 1}
    lease = await book.acquire(SPEC)
    assert str(lease.host.instance) == "a-1"
    assert held(book) == 1
    book.release(lease)
    assert held(book) == 0
    assert book.demand().last_used == {NAME: 100.0}


async def test_the_least_busy_instance_is_chosen(world: World, book: LeaseBook) -> None:
    world.slots = {1: 2, 2: 2}
    leases = [await book.acquire(SPEC) for _ in range(4)]
    assert [lease.host.instance.number for lease in leases] == [1, 2, 1, 2]


async def test_those_who_wait_are_served_in_order(world: World, book: LeaseBook) -> None:
    first, second = await waits(book), await waits(book)
    assert waiting(book) == 2
    assert world.wakes
    world.slots = {1: 1}
    book.serve_all()
    lease = await first
    assert not second.done()
    book.release(lease)
    assert (await second).host.instance.number == 1
    assert held(book) == 1


async def test_a_full_queue_refuses(book: LeaseBook) -> None:
    kept = [await waits(book) for _ in range(2)]
    with pytest.raises(RequestError) as caught:
        await book.acquire(SPEC)
    assert caught.value.status == 429
    for task in kept:
        task.cancel()


async def test_waiting_has_an_end(book: LeaseBook) -> None:
    with pytest.raises(RequestError) as caught:
        await book.acquire(replace(SPEC, queue=QueueLimits(max_wait=Seconds(0.01))))
    assert (caught.value.status, caught.value.code) == (504, "wait_timeout")
    assert waiting(book) == 0


async def test_leaving_the_queue(book: LeaseBook) -> None:
    task = await waits(book)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert waiting(book) == 0


async def test_leaving_in_the_moment_of_the_grant_gives_it_back(world: World, book: LeaseBook) -> None:
    leaving, next_one = await waits(book), await waits(book)
    world.slots = {1: 1}
    book.serve_all()  # granted, and not yet told
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert (await next_one).host.instance.number == 1
    assert held(book) == 1


async def test_who_waits_in_vain_is_refused(world: World, book: LeaseBook) -> None:
    task = await waits(book)
    world.decision = Decision(model=NAME, state=ModelState.FAILED, sentence="its file is truncated")
    book.serve_all()
    with pytest.raises(RequestError, match="its file is truncated") as caught:
        await task
    assert caught.value.status == 503


async def test_a_model_that_is_removed_refuses_those_who_wait(book: LeaseBook) -> None:
    task = await waits(book)
    book.forget_models(lambda _: None)
    with pytest.raises(RequestError) as caught:
        await task
    assert caught.value.status == 404
    assert not book.demand().last_used


async def test_a_closed_book_refuses_everybody(world: World, book: LeaseBook) -> None:
    task = await waits(book)
    world.slots = {1: 1}
    book.close("shutting down")
    for each in (task, book.acquire(SPEC)):
        with pytest.raises(RequestError) as caught:
            await each
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")


async def test_hanging_up_tells_every_request_why(world: World, book: LeaseBook) -> None:
    world.slots = {1: 2}
    leases = [await book.acquire(SPEC) for _ in range(2)]
    book.hang_up(leases[0].host.instance, "it ended")
    book.hang_up(leases[0].host.instance, "and again")
    assert [lease.revoked.result() for lease in leases] == ["it ended", "it ended"]


async def test_borrowing_goes_beside_the_slots(world: World, book: LeaseBook) -> None:
    assert book.borrow(SPEC) is None
    world.slots = {1: 1}
    beside = book.borrow(SPEC)
    leases = [await book.acquire(SPEC), beside]
    assert held(book) == 1
    for lease in leases:
        assert lease
        book.release(lease)
    assert held(book) == 0


async def test_nothing_is_noted_of_an_instance_whose_last_request_outlives_it(book: LeaseBook, world: World) -> None:
    """A client that takes its time to read how its stream broke off, on a server that is long gone."""
    for number in range(1, 50):
        world.slots = {number: 2}
        first, second = await book.acquire(SPEC), await book.acquire(SPEC)
        world.slots = {}
        book.hang_up(first.host.instance, "it died", died=True)
        book.forget(first.host.instance)
        for lease in (first, second):
            book.memory.ill(lease.host.instance)
            book.release(lease)
    assert book.demand().idle_since == {}
    assert book.memory.ailing == {}
    assert book._holds._gone == set()
    world.slots = {50: 1}
    last = await book.acquire(SPEC)
    book.release(last)
    assert list(book.demand().idle_since) == [last.host.instance]


async def test_what_is_granted_at_once_is_what_would_be_granted_in_line(world: World, book: LeaseBook) -> None:
    world.slots = {1: 2}
    first, second = book.grant(SPEC), await book.acquire(SPEC)
    assert first is not None
    assert (first.why, second.why) == ("a-1 is ready with 0 of 2 slots busy", "a-1 is ready with 1 of 2 slots busy")
    assert (first.crowded, second.crowded, first.waited, held(book)) == (True, True, 0, 2)
    assert book.grant(SPEC) is None  # it is full
    waiting = await waits(book)
    book.release(first)
    assert (await waiting).host.instance == second.host.instance
    book.release(second)
    later = await waits(book)
    assert later.done()
    assert book.grant(SPEC) is None
    world.slots = {}
    assert book.grant(SPEC) is None  # there is none


async def test_one_that_has_failed_is_looked_at_more_closely(world: World, book: LeaseBook) -> None:
    world.slots = {1: 4}
    for _ in range(FAILURES):
        book.memory.ill(InstanceId(LOCAL, NAME, 1))
    lease = book.grant(SPEC)  # the ailing are better than none
    assert lease is not None
    book.release(lease)
    world.time += EJECTED + 1
    assert book.grant(SPEC) is not None
    assert book.grant(SPEC) is None  # on trial: one at a time


async def test_whoever_holds_one_is_told_once_that_it_goes_away(world: World, book: LeaseBook) -> None:
    world.slots = {1: 2}
    told: list[str] = []
    one, other = await book.acquire(SPEC), await book.acquire(SPEC)
    one.told = lambda: told.append(one.revoked.result())
    assert not one.is_revoked
    for why in ("it died", "it is gone"):
        book.hang_up(one.host.instance, why, died=True)
    assert (told, one.is_revoked, other.is_revoked, one.died, other.died) == (["it died"], True, True, True, True)


async def test_that_an_instance_rests_is_no_hurry_unless_somebody_waits(world: World) -> None:
    rested: list[None] = []
    book = LeaseBook(
        clock=world,
        hosts=world.hosts,
        decision=lambda _: world.decision,
        wake=world.wake,
        rested=lambda: rested.append(None),
    )
    world.slots = {1: 1}
    book.release(await book.acquire(SPEC))
    assert (world.wakes, len(rested)) == (0, 1)
    lease = await book.acquire(SPEC)
    waiting = await waits(book)
    before = world.wakes
    book.release(lease)
    assert (world.wakes, len(rested)) == (before + 1, 1)
    book.release(await waiting)
    assert len(rested) == 2
