"""The rounds: how soon it is looked again, what is read then, and that nothing is done where there is nothing to look at."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from offloadd import rounds
from offloadd.events import EventKind, event_of
from offloadd.rounds import QUIET_REFRESH, REFRESH, RELEASE_POLL, Premises, Rounds, keep
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.desired import DesiredState
from offloadd.state.ids import HOST_RAM, InstanceId, ModelName
from offloadd.state.observed import InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes
from tests.fakes.parts import Part
from tests.unit.plan.build import key, view

A = ModelName("a")
OFF, WAITING = (Plan(decisions={A: Decision(model=A, state=state, sentence="")}) for state in (ModelState.OFF, ModelState.BACKOFF))


class World:
    """A machine with these instances. No time is waited; `paused` says how long each wait would have lasted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.views: list[InstanceView] = []
        self.loans: list[str] = []
        self.plan = OFF
        self.told: list[str] = []
        self.paused: list[float] = []
        self.learned: list[InstanceId] = []
        self.news = False
        self.reading: list[InstanceView] = []
        """What the instances are when a reading is over."""
        self.lives = Part("lives", self.told)
        self.lives.problem = ""
        timeout, sleep = asyncio.timeout, asyncio.sleep

        def no_wait(delay: float) -> Any:
            self.paused.append(delay)
            return timeout(0)

        monkeypatch.setattr(asyncio, "timeout", no_wait)
        monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))
        self.rounds = Rounds(self._premises())

    def _premises(self) -> Premises:
        observer = Part("observer", self.told, "refresh", "read_memory", "look_ahead", refresh=self._read, read_memory=self._read)
        observer.holdings = Part("holdings", self.told)
        observer.candidates = {}
        chronicle = Part("chronicle", [], learn=self._learn)
        chronicle.recorder = SimpleNamespace(footprints={})
        parts: dict[str, Any] = {
            "observer": observer,
            "catalog": Part("catalog", self.told, "prepare"),
            "executor": Part("executor", [], views=lambda: {each.id: each for each in self.views}, pids={}),
            "loans": Part("loans", [], loans=lambda: dict.fromkeys(self.loans), pids={}),
            "chronicle": chronicle,
            "signals": Part("signals", self.told, "attend"),
            "forwarder": Part("forwarder", self.told),
            "logs": Part("logs", self.told),
            "lives": self.lives,
            "observed": lambda: ObservedState(instances={each.id: each for each in self.views}),
            "latest": lambda: self.plan,
            "wake": lambda: self.told.append("wake"),
        }
        return Premises(**parts)

    def _read(self, *_: object) -> None:
        self.views = self.reading or self.views

    def _learn(self, views: Any) -> bool:
        self.learned += [each.id for each in views]
        return self.news


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


READ = ["observer.refresh", "holdings.forget", "wake"]
READ_MEMORY = ["observer.read_memory", "holdings.forget", "wake"]


async def test_a_quiet_machine_is_looked_at_seldom(world: World) -> None:
    await world.rounds.look_again()
    assert (world.paused, world.told) == ([QUIET_REFRESH], READ)


@pytest.mark.parametrize("busy", ["instance", "loan", "model"])
async def test_one_where_something_runs_or_is_waited_for_is_looked_at_often(world: World, busy: str) -> None:
    world.views = [view("a-1", 1)] if busy == "instance" else []
    world.loans = ["loan-1"] if busy == "loan" else []
    world.plan = WAITING if busy == "model" else OFF
    await world.rounds.look_again()
    assert (world.paused, world.told) == ([REFRESH], READ)


@pytest.mark.parametrize(
    "one",
    [
        view("a-1", 1, InstanceState.EXITED, unreleased={HOST_RAM: Bytes(1)}),
        view("a-1", 1, InstanceState.FALLING_ASLEEP),
    ],
    ids=["ended", "falls asleep"],
)
async def test_memory_on_its_way_back_is_read_at_once_and_nothing_else_is(world: World, one: InstanceView) -> None:
    world.views = [one]
    await world.rounds.look_again()
    assert (world.paused, world.told) == ([RELEASE_POLL], READ_MEMORY)


async def test_memory_that_is_to_be_given_is_read_once(world: World) -> None:
    world.rounds.read_now()
    await world.rounds.look_again()
    assert world.told == READ_MEMORY
    await world.rounds.look_again()
    assert world.told == [*READ_MEMORY, *READ]


async def test_who_asks_for_a_look_does_not_wait_for_the_next(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.undo()  # time goes its way again
    monkeypatch.setattr(rounds, "QUIET_REFRESH", 3600)
    world.rounds.look_soon()
    await world.rounds.look_again()
    assert world.told == READ
    look = asyncio.create_task(world.rounds.look_again())
    await asyncio.sleep(0)
    assert world.told == READ
    world.rounds.look_soon()
    await look
    assert world.told == [*READ, *READ]


async def test_only_who_was_ready_all_through_a_reading_is_learned_from(world: World) -> None:
    loading = InstanceState.LOADING
    world.views = [view("stays-1", 1), view("comes-1", 1, loading), view("goes-1", 1)]
    world.reading = [view("stays-1", 1), view("comes-1", 1), view("goes-1", 1, InstanceState.DRAINING)]
    await world.rounds.look_again()
    assert world.learned == [key("stays-1")]
    assert "observer.know" not in world.told
    world.news = True
    await world.rounds.look_again()
    assert world.told[-1] == "observer.know"


TENDED = ["forwarder.forward", "logs.trim", "lives.retry"]


async def test_logs_are_tended_once_more_when_the_last_instance_is_gone(world: World) -> None:
    world.views = [view("a-1", 1)]
    await world.rounds.trim_logs()
    assert world.told == TENDED
    world.views = []
    await world.rounds.trim_logs()
    assert world.told == [*TENDED, *TENDED]
    assert world.paused == []
    await world.rounds.trim_logs()
    assert world.told == [*TENDED, *TENDED]
    assert world.paused == [QUIET_REFRESH]


async def test_lives_that_could_not_be_written_are_tried_again_though_nothing_runs(world: World) -> None:
    await world.rounds.trim_logs()
    world.lives.problem = "the disk is full"
    world.told.clear()
    await world.rounds.trim_logs()
    assert world.told == TENDED
    assert world.paused == []


async def test_engines_are_asked_at_once_while_there_are_instances(world: World) -> None:
    world.views = [view("a-1", 1)]
    await world.rounds.ask_engines()
    assert (world.paused, world.told) == ([], ["signals.attend"])


async def test_engines_are_asked_each_time_when_an_instance_begins(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(rounds, "QUIET_REFRESH", 3600)
    for times in range(2):
        asking = asyncio.create_task(world.rounds.ask_engines())
        await asyncio.sleep(0)
        assert world.told == ["signals.attend"] * times
        world.rounds.stir()
        await asking
        assert world.told == ["signals.attend"] * (times + 1)


async def test_what_a_new_config_names_is_read_when_it_is_known_what_that_is(world: World) -> None:
    await world.rounds.look_ahead(DesiredState())
    assert world.told == ["catalog.prepare", "catalog.with_config", "observer.look_ahead"]


async def test_a_step_that_fails_is_told_and_taken_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(rounds, "REFRESH", 0)
    taken: list[int] = []

    async def step() -> None:
        taken.append(len(taken))
        if len(taken) == 3:
            raise asyncio.CancelledError
        if len(taken) == 1:
            raise OSError("the disk is gone")

    with caplog.at_level(logging.ERROR, "offloadd"), pytest.raises(asyncio.CancelledError):
        await keep("the look", step)
    assert taken == [0, 1, 2]
    (record,) = caplog.records
    event = event_of(record)
    assert event is not None
    assert (record.getMessage(), event.kind) == ("the look failed", EventKind.INTERNAL_ERROR)
