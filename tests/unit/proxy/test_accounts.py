"""When requests that are over are accounted for: a moment later, at once when there are many, and before anybody asks."""

from __future__ import annotations

import asyncio
import logging

import pytest

from offloadd.clock import SystemClock
from offloadd.proxy import account as module
from offloadd.proxy.account import Accounts, Answered
from offloadd.proxy.lease import Host, Lease
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint
from offloadd.state.served import Fate, Served
from offloadd.units import Instant, Seconds

PATH = "/v1/chat/completions"
BODY = b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
HOST = Host(
    instance=InstanceId(LOCAL, ModelName("a"), 1),
    backend=BackendName("llamacpp"),
    endpoint=Endpoint(host="127.0.0.1", port=1),
    slots=2,
    sign=lambda: None,
)


def answered(name: str, body: bytes = BODY) -> Answered:
    lease = Lease(host=HOST, why="a-1 is ready with 0 of 2 slots busy", waited=Seconds(0))
    return Answered(name, PATH, "mine", lease, Instant(10.0), Instant(10.5), 40, body)


@pytest.fixture
def served() -> list[Served]:
    return []


@pytest.fixture
def accounts(served: list[Served]) -> Accounts:
    made = Accounts(SystemClock(), served.append)
    made.know("openai", PATH)
    return made


async def test_a_moment_later_in_their_order(accounts: Accounts, served: list[Served], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOON", 0.001)
    for name in ("one", "two"):
        accounts.answered(answered(name))
    assert served == []
    async with asyncio.timeout(10):
        while len(served) < 2:
            await asyncio.sleep(0.001)
    assert [one.request for one in served] == ["one", "two"]
    accounts.answered(answered("three"))  # the next moment begins anew
    async with asyncio.timeout(10):
        while len(served) < 3:
            await asyncio.sleep(0.001)


async def test_at_once_when_there_are_many_or_somebody_asks(accounts: Accounts, served: list[Served]) -> None:
    for number in range(module.MOST_OPEN):
        assert served == []
        accounts.answered(answered(str(number)))
    assert len(served) == module.MOST_OPEN
    accounts.answered(answered("last"))
    accounts.flush()
    assert served[-1].request == "last"
    accounts.answered(answered("large", b" " * (module.LARGE + 1)))
    assert served[-1].request == "large"


async def test_the_whole_of_an_account(accounts: Accounts, served: list[Served], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "offloadd")
    accounts.answered(answered("one"))
    accounts.flush()
    assert served == [
        Served(
            request="one",
            path=PATH,
            dialect="openai",
            fate=Fate.ANSWERED,
            status=200,
            arrived=Instant(10.0),
            duration=Seconds(0.5),
            waited=Seconds(0),
            first_byte=Seconds(0.5),
            model=ModelName("a"),
            backend=BackendName("llamacpp"),
            instance=HOST.instance,
            key="mine",
            bytes_in=40,
            bytes_out=len(BODY),
            prompt_tokens=3,
            completion_tokens=2,
            reason="a-1 is ready with 0 of 2 slots busy",
        )
    ]
    assert "answered 200" in caplog.text


@pytest.mark.parametrize("filler", [0, 10_000], ids=["short", "long"])
async def test_its_tokens_are_found_wherever_they_stand(accounts: Accounts, served: list[Served], filler: int) -> None:
    text = b'"text": "' + b"x" * filler + b'"'
    count = b'"usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}'
    speed = b'"timings": {"prompt_n": 3, "cache_n": 4, "predicted_n": 5, "predicted_per_second": 12.5}'
    for members in ((text, count, speed), (count, speed, text)):
        accounts.answered(answered("one", b"{%b}" % b", ".join(members)))
    accounts.answered(answered("two", b"{%b" % b", ".join((count, text))))  # no sound JSON
    accounts.flush()
    found = [(one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.tokens_per_second) for one in served]
    assert found == [(7, 4, 5, 12.5), (7, 4, 5, 12.5), (7, 4, 5, None)]
