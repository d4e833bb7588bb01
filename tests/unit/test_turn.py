"""What a turn of the loop brings: read first, worked through next, written last."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from offloadd import turn as module
from offloadd.turn import MOST, SMALL, Turn


@dataclass
class Log:
    """What happened, in its order."""

    said: list[str] = field(default_factory=list)


@dataclass
class Transport:
    log: Log
    name: str
    closing: bool = False

    def write(self, data: bytes) -> None:
        self.log.said.append(f"{self.name} writes {len(data)}")

    def is_closing(self) -> bool:
        return self.closing


@dataclass
class Connection:
    """Writes what it is told to when its turn has come."""

    turn: Turn
    log: Log
    name: str
    data: bytes = b"x"
    fails: bool = False
    closes: bool = False
    numbers: list[int] = field(default_factory=list)

    def received(self) -> None:
        self.log.said.append(f"{self.name} works")
        self.numbers.append(self.turn.number)
        if self.fails:
            raise ValueError("it cannot")
        transport = Transport(self.log, self.name)
        self.turn.write(cast(Any, transport), self.data)
        transport.closing = self.closes

    def broken(self, error: Exception) -> None:
        self.log.said.append(f"{self.name} is closed: {error}")


@pytest.fixture
def log() -> Log:
    return Log()


async def test_the_first_is_not_kept_waiting(log: Log) -> None:
    turn = Turn()
    turn.request(Connection(turn, log, "a"))
    assert log.said == ["a works", "a writes 1"]


async def test_the_others_are_worked_through_at_the_end_answers_first_and_written_last(log: Log) -> None:
    turn = Turn()
    for name in "ab":
        turn.request(Connection(turn, log, name))
    turn.answer(Connection(turn, log, "c"))
    turn.request(Connection(turn, log, "d"))
    assert log.said == ["a works", "a writes 1"]
    await asyncio.sleep(0)
    assert log.said[2:] == ["c works", "b works", "d works", "c writes 1", "b writes 1", "d writes 1"]


async def test_each_turn_has_a_first(log: Log) -> None:
    turn = Turn()
    for name in "abc":
        turn.answer(Connection(turn, log, name))
        await asyncio.sleep(0)
    assert log.said == ["a works", "a writes 1", "b works", "b writes 1", "c works", "c writes 1"]


async def test_no_more_than_so_many_are_kept(log: Log) -> None:
    turn = Turn()
    for number in range(MOST):
        turn.request(Connection(turn, log, str(number)))
    assert log.said == ["0 works", "0 writes 1"]
    turn.request(Connection(turn, log, "last"))
    assert log.said[-1] == "last writes 1"
    assert len(log.said) == 2 * (MOST + 1)
    await asyncio.sleep(0)
    assert len(log.said) == 2 * (MOST + 1)


async def test_one_that_fails_is_closed_and_the_others_are_not(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    turn = Turn()
    turn.request(Connection(turn, log, "a"))
    turn.request(Connection(turn, log, "b", fails=True))
    turn.request(Connection(turn, log, "c"))
    await asyncio.sleep(0)
    assert log.said[2:] == ["b works", "b is closed: it cannot", "c works", "c writes 1"]
    assert "it cannot" in caplog.text


async def test_what_is_large_is_written_at_once_and_nothing_to_who_has_closed(log: Log) -> None:
    turn = Turn()
    turn.request(Connection(turn, log, "a"))
    turn.request(Connection(turn, log, "b", data=b"x" * (SMALL + 1)))
    turn.request(Connection(turn, log, "c", closes=True))
    turn.request(Connection(turn, log, "d"))
    await asyncio.sleep(0)
    assert log.said[2:] == ["b works", f"b writes {SMALL + 1}", "c works", "d works", "d writes 1"]


async def test_who_must_write_before_the_end_can(log: Log) -> None:
    turn = Turn()

    class Hasty(Connection):
        def received(self) -> None:
            super().received()
            self.turn.flush()
            self.log.said.append(f"{self.name} closes its side")

    turn.request(Connection(turn, log, "a"))
    turn.request(Connection(turn, log, "b"))
    turn.request(Hasty(turn, log, "c"))
    turn.request(Connection(turn, log, "d"))
    await asyncio.sleep(0)
    assert log.said[2:] == ["b works", "c works", "b writes 1", "c writes 1", "c closes its side", "d works", "d writes 1"]


async def test_what_comes_of_work_is_worked_through_as_well(log: Log) -> None:
    """As when a client's next request has come before the answer to its last."""
    turn = Turn()

    class Double(Connection):
        def received(self) -> None:
            super().received()
            self.turn.request(Connection(self.turn, self.log, f"{self.name}2"))

    for name in "abc":
        turn.request(Double(turn, log, name))
    for _ in range(3):
        await asyncio.sleep(0)
    assert sorted(said for said in log.said if "works" in said) == [f"{name} works" for name in ("a", "a2", "b", "b2", "c", "c2")]
    assert sum("writes" in said for said in log.said) == 6
    assert turn._answers == turn._requests == []


async def test_pieces_of_work_are_told_apart_by_their_numbers(log: Log) -> None:
    turn = Turn()
    connections = [Connection(turn, log, name) for name in "abcd"]
    assert turn.number == 0
    for connection in connections[:3]:
        turn.request(connection)
    await asyncio.sleep(0)
    turn.request(connections[3])
    first, second, third, fourth = (connection.numbers[0] for connection in connections)
    assert second == third  # nothing happens between these two
    assert len({0, first, second, fourth}) == 4
    assert (turn.number, turn._late, module.MOST) == (0, None, MOST)
