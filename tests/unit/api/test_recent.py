"""What is remembered of events and requests, within bounds, and who is told of them."""

from __future__ import annotations

import logging
import threading
import tracemalloc
from collections.abc import Iterator

import pytest

from offloadd.api import recent as module
from offloadd.api.recent import BACKLOG, Recent, shown
from offloadd.errors import RequestError
from offloadd.events import EventKind, about
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.served import Fate, Served
from offloadd.units import Instant, Seconds

log = logging.getLogger("offloadd.tests.history")


@pytest.fixture
def history() -> Iterator[Recent]:
    made = Recent(lambda: 5000.0)
    log.addHandler(made)
    log.setLevel(logging.INFO)
    yield made
    log.removeHandler(made)


def tell(text: str, kind: EventKind = EventKind.DECISION, **names: object) -> None:
    log.info("%s", text, extra=about(kind, **names))  # type: ignore[arg-type]


def served(request: str, **fields: object) -> Served:
    plain: dict[str, object] = {
        "request": request,
        "path": "/v1/chat/completions",
        "dialect": "openai",
        "fate": Fate.ANSWERED,
        "status": 200,
        "arrived": Instant(1.0),
        "duration": Seconds(1.5),
        "waited": Seconds(1.0),
        "model": ModelName("a"),
        "backend": BackendName("llamacpp"),
        "instance": InstanceId(LOCAL, ModelName("a"), 2),
        "reason": "a-2 is ready with 0 of 2 slots busy",
    }
    return Served(**plain | fields)  # type: ignore[arg-type]


def test_events_are_found_by_model_and_by_instance(history: Recent) -> None:
    tell("a: starts", model="a")
    tell("a-2: stopping (evicted): to make room for b", EventKind.INSTANCE_STOPPING, model="a", instance="a-2")
    tell("b: waits", model="b")
    log.info("no event")
    assert [entry.message for entry in history.of_model("a")] == ["a: starts", "a-2: stopping (evicted): to make room for b"]
    assert [entry.message for entry in history.of_instance("a-2")] == ["a-2: stopping (evicted): to make room for b"]
    assert [entry.message for entry in history.latest()][-1] == "b: waits"
    assert history.of_model("nobody") == []
    first = shown(history.of_instance("a-2")[0])
    assert first["kind"] == "instance-stopping"
    assert (first["model"], first["instance"], first["level"], "request" in first) == ("a", "a-2", "info", False)


def test_a_requests_way_is_told_from_its_wait_to_its_end(history: Recent) -> None:
    history.waits("a", "r1", "a-1 is loading")
    history.served(served("r1"))
    wait, end = history.of_request("r1")
    assert wait.message == "waits for a: a-1 is loading"
    assert end.message == (
        "/v1/chat/completions answered with 200 by a-2 in 1.5 s, after 1 s in the queue: a-2 is ready with 0 of 2 slots busy"
    )
    assert [entry.about.request for entry in history.requests_of("a")] == ["r1", "r1"]
    assert history.of_model("a") == []  # so that requests never push decisions out


def test_every_memory_has_a_bound(history: Recent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NAMES", 3)
    for number in range(500):
        tell(f"decision {number} " + "x" * 5000, model="m4" if number > 4 else f"m{number}")
    assert len(history.of_model("m4")) == module.KEPT_EACH
    assert history.of_model("m1") == []
    assert max(len(entry.message) for entry in history.latest()) == module.LONGEST


def test_how_requests_ended_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy model pushes out its own only, until there are too many of all."""
    monkeypatch.setattr(module, "KEPT_ENDS", 250)
    history = Recent(lambda: 5000.0)
    history.served(served("first", model="quiet"))
    for number in range(1000):
        history.served(served(f"r{number}", model="busy"))
    assert [entry.about.request for entry in history.requests_of("busy")] == [f"r{number}" for number in range(900, 1000)]
    assert [entry.about.request for entry in history.requests_of("quiet")] == ["first"]
    assert (history.of_request("first"), history.of_request("r749")) == ([], [])
    assert len(history.of_request("r750")) == len(history.of_request("r999")) == 1
    for number in range(149):
        history.served(served(f"o{number}", model=f"m{number}"))
    assert len(history.requests_of("busy")) == module.KEPT_EACH
    history.served(served("last", model="one-more"))
    assert history.requests_of("quiet") == []  # it was heard of longest ago
    history.served(served("last", model="another"))
    assert history.requests_of("busy") == []
    assert history._ends._count == 151


def test_what_is_remembered_is_bounded_in_bytes(history: Recent) -> None:
    """Of many names: a hundred events of each of thousands of instances would be hundreds of MiB."""
    tracemalloc.start()
    try:
        for number in range(1000):
            names = {"model": f"m{number}", "instance": f"a-{number}", "request": f"r{number}"}
            for part in range(12):
                said = about(EventKind.DECISION, **names, why=f"{number} " * 50)  # type: ignore[arg-type]
                history.emit(logging.makeLogRecord({"msg": f"{number} {part} " + "x" * 1990, **said}))
            for part in range(6):
                history.served(served(f"r{number}", path=f"/v1/{number}-{part}", model=f"m{number}", reason=f"{number} " * 200))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    rings = (history._models, history._instances, history._requests)
    assert [0 < ring._size <= module.KEPT_BYTES for ring in rings] == [True] * 3
    assert taken < (len(rings) + 1) * module.KEPT_BYTES
    assert len(history.of_instance("a-999")) == 12
    assert len(history.of_request("r999")) == 18
    assert history.of_instance("a-1") == []


def test_of_a_long_reason_the_beginning_is_kept(history: Recent) -> None:
    history.served(served("r1", reason="x" * module.KEPT_BYTES))
    assert history.of_request("r1")[0].message.endswith(" in the queue: " + "x" * module.LONGEST_REASON)


def test_nothing_is_kept_of_what_is_larger_than_all(history: Recent) -> None:
    tell("a: starts", model="a", why="x" * module.KEPT_BYTES)
    assert history.of_model("a") == []
    tell("a: starts", model="a")
    assert len(history.of_model("a")) == 1


async def test_a_follower_hears_what_happens_also_in_other_threads(history: Recent) -> None:
    follower = history.follow()
    tell("one", model="a")
    thread = threading.Thread(target=tell, args=("two",), kwargs={"model": "a"})
    thread.start()
    thread.join()
    first, second = await follower.queue.get(), await follower.queue.get()
    assert first is not None
    assert second is not None
    assert (first.message, second.message) == ("one", "two")
    history.leave(follower)
    tell("three", model="a")
    assert follower.queue.empty()


async def test_a_slow_follower_is_let_go_and_told_so(history: Recent) -> None:
    slow, quick = history.follow(), history.follow()
    for number in range(BACKLOG + 10):
        tell(str(number), model="a")
        assert await quick.queue.get() is not None
    assert (slow.lost, quick.lost) == (True, False)
    heard = [slow.queue.get_nowait() for _ in range(slow.queue.qsize())]
    assert len(heard) == BACKLOG
    assert heard[-1] is None


async def test_only_so_many_may_follow(history: Recent) -> None:
    followers = [history.follow() for _ in range(module.MAX_FOLLOWERS)]
    with pytest.raises(RequestError, match="follow the events already"):
        history.follow()
    history.leave(followers[0])
    history.follow()
