"""`POST /borrow`: what it refuses, what it tells, and that it always gives back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from offloadd.api import borrow
from offloadd.api.borrow import borrow_route
from offloadd.clock import SystemClock
from offloadd.errors import RequestError
from offloadd.plan.planner import plan
from offloadd.runtime.loans import LoanBook
from offloadd.state.actions import GrantLoan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.ids import HOST_RAM, DeviceId
from offloadd.state.observed import ObservedState
from offloadd.units import Bytes, Seconds
from tests.unit.plan.build import NOW, gib, ram


class Book:
    """Grants when told."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, str, int | None]] = []
        self.returned: list[str] = []
        self.granted = asyncio.Event()
        self.refusal = ""
        self.sentence = "waits: needs more"

    def ask(self, size: Bytes, device: str, why: str, pid: int | None) -> str:
        self.asked.append((size, device, why, pid))
        return f"loan-{len(self.asked)}"

    async def wait(self, name: str) -> Mapping[DeviceId, Bytes]:
        await self.granted.wait()
        if self.refusal:
            raise RequestError(409, "loan_impossible", self.refusal)
        return {HOST_RAM: Bytes(self.asked[-1][0])}

    def give_back(self, name: str) -> None:
        self.returned.append(name)


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    monkeypatch.setattr(borrow, "FIRST_WORD", Seconds(0.02))
    monkeypatch.setattr(borrow, "REPEAT", Seconds(0.05))
    return Book()


@pytest.fixture
async def client(book: Book) -> AsyncIterator[TestClient[Any, Any]]:
    @web.middleware
    async def around(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except RequestError as error:
            response = web.json_response(error.body, status=error.status)
        return response

    app = web.Application(middlewares=[around])
    app.add_routes([borrow_route(book, lambda _: book.sentence)])
    async with TestClient(TestServer(app, handler_cancellation=True)) as opened:
        yield opened


async def next_event(answer: aiohttp.ClientResponse) -> Any:
    async with asyncio.timeout(5):
        while True:
            line = await answer.content.readline()
            if line.strip() or not line:
                return json.loads(line) if line else None


async def until_returned(book: Book) -> None:
    async with asyncio.timeout(5):
        while not book.returned:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"", "invalid_body", "the request's body is not as expected"),
        (b"\xff", "invalid_body", "the request's body is not as expected"),
        (b"[]", "invalid_body", "Expected `object`"),
        (b"{}", "invalid_body", "missing required field `size`"),
        (b'{"size": 10}', "invalid_body", "Expected `str`"),
        (b'{"size": "1GiB", "gpu": 0}', "invalid_body", "unknown field `gpu`"),
        (b'{"size": "1GiB", "limit": "1s"}', "invalid_body", "unknown field `limit`"),
        (b'{"size": "1GiB", "pid": "1"}', "invalid_body", "Expected `int | null`"),
        (b'{"size": "much"}', "invalid_size", "expected a size"),
        (b'{"size": "10%"}', "invalid_size", "unknown size unit"),
        (b'{"size": "0MiB"}', "invalid_size", "nothing to borrow"),
        (b'{"size": "1GiB", "for": "10"}', "invalid_time", "needs a unit"),
        (b'{"size": "1GiB", "for": "10ms"}', "invalid_time", "too short"),
    ],
)
async def test_a_body_that_makes_no_sense_is_refused(
    client: TestClient[Any, Any], book: Book, body: bytes, code: str, said: str
) -> None:
    answer = await client.post("/borrow", data=body)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, code)
    assert said in error["message"]
    assert book.asked == []


async def test_a_loan_is_told_of_from_first_to_last(client: TestClient[Any, Any], book: Book) -> None:
    body = {"size": "1GiB", "device": "0", "for": "1s", "why": "x" * 500, "pid": 42}
    async with client.post("/borrow", json=body) as answer:
        assert answer.status == 200
        assert await next_event(answer) == {"state": "waiting", "loan": "loan-1", "reason": "waits: needs more"}
        book.sentence = "holds it"
        book.granted.set()
        while (event := await next_event(answer))["state"] == "waiting":
            pass
        assert event == {"state": "granted", "loan": "loan-1", "devices": {"host": 2**30}, "reason": "holds it"}
        assert book.returned == []
        assert await next_event(answer) == {"state": "ended", "loan": "loan-1", "reason": "its time of 1s is over"}
        assert await next_event(answer) is None
    assert book.asked == [(2**30, "0", "x" * 200, 42)]
    assert book.returned == ["loan-1"]


@pytest.mark.parametrize("granted", [False, True])
async def test_a_borrower_that_leaves_gives_back(client: TestClient[Any, Any], book: Book, granted: bool) -> None:
    if granted:
        book.granted.set()
    answer = await client.post("/borrow", json={"size": "1GiB"})
    assert (await next_event(answer))["state"] == ("granted" if granted else "waiting")
    answer.close()
    await until_returned(book)


async def test_one_that_can_never_be_had_is_refused_by_its_status(client: TestClient[Any, Any], book: Book) -> None:
    book.refusal = "cannot be had: it needs too much"
    book.granted.set()
    answer = await client.post("/borrow", json={"size": "1GiB"})
    error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["message"]) == (409, "loan_impossible", book.refusal)
    assert book.returned == ["loan-1"]


async def test_one_that_cannot_be_had_any_more_is_ended(client: TestClient[Any, Any], book: Book) -> None:
    async with client.post("/borrow", json={"size": "1GiB"}) as answer:
        assert (await next_event(answer))["state"] == "waiting"
        book.refusal = "cannot be had: the limit is lower now"
        book.granted.set()
        while (event := await next_event(answer))["state"] == "waiting":
            pass
        assert event == {"state": "refused", "loan": "loan-1", "reason": book.refusal}
        assert await next_event(answer) is None
    assert book.returned == ["loan-1"]


async def test_the_book_refuses_what_the_planner_calls_hopeless_and_nothing_else() -> None:
    loans = LoanBook(clock=SystemClock(), wake=lambda: None, measured=lambda _: {})
    much, little = loans.ask(gib(100), "auto", "", None), loans.ask(gib(1), "auto", "", None)
    answer = plan(DesiredState(), ObservedState(devices={HOST_RAM: ram()}), Demand(loans=loans.loans()), now=NOW)
    loans.refuse(answer)
    with pytest.raises(RequestError, match="cannot be had: it needs 100 GiB"):
        await loans.wait(much)
    for action in answer.actions:
        assert isinstance(action, GrantLoan)
        loans.grant(action)
    assert await loans.wait(little) == {HOST_RAM: gib(1)}
    for name in (much, little):
        loans.give_back(name)
    assert loans.loans() == {}
