"""When models start and stop, and what a request meets meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.servers import until
from tests.integration.daemon import CHAT, Daemon, alive, chat, elapsed, marks, model, running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the tests whose models do not meet."""
    folder = tmp_path_factory.mktemp("shared")
    models = {
        "steady": model(aliases=["default"]),
        "herd": model(run="on-demand", parallel=4, env={"STANDIN_LOAD_S": 0.3, "STANDIN_MARK_FILE": folder / "herd"}),
        "brief": model(run="on-demand", idle_timeout="500ms"),
        "never": model(run="never"),
        "narrow": model(parallel=1, queue={"max_waiting": 1}, env={"STANDIN_TOKEN_S": 0.02}),
        "slow": model(run="on-demand", queue={"max_wait": "300ms"}, env={"STANDIN_LOAD_S": 600}),
    }
    with running(folder, models) as daemon:
        yield daemon


def test_an_always_model_gets_ready_without_a_request(shared: Daemon) -> None:
    found = shared.wait_for("steady")
    (instance,) = found["instances"]
    assert instance["state"] == "ready"
    assert alive(instance["pid"])
    assert "steady-1 is ready on llamacpp" in found["reason"]
    assert shared.chat("steady").json()["choices"][0]["message"]["content"]


def test_requests_for_a_cold_model_share_one_start_and_wait_for_it(shared: Daemon) -> None:
    assert shared.look("herd")["state"] == "off"
    asked = [shared.chat_soon("herd", 2) for _ in range(50)]
    assert {reply.result().status for reply in asked} == {200}
    assert marks(shared.folder / "herd").count("start") == 1
    assert shared.launches("herd") == 1


def test_an_idle_model_is_unloaded_and_starts_again_when_asked_for(shared: Daemon) -> None:
    assert shared.chat("brief").status == 200
    found = shared.wait_for("brief", "off")
    assert found["last_exit"]["kind"] == "stopped"
    assert "idle_timeout" in found["last_exit"]["message"]
    reply = shared.chat("brief")
    assert reply.status == 200
    assert reply.headers["X-Offloadd-Instance"] == "brief-2"


def test_a_model_with_requests_is_not_idle(shared: Daemon) -> None:
    with shared.stream("brief", 200) as stream:  # twice as long as its idle_timeout
        assert list(stream)[-1] == "[DONE]"


def test_run_never_refuses(shared: Daemon) -> None:
    reply = shared.chat("never")
    assert reply.status == 409
    assert reply.json()["error"]["code"] == "model_disabled"


def test_an_unknown_model_is_refused_with_near_names(shared: Daemon) -> None:
    reply = shared.chat("stedy")
    assert reply.status == 404
    error = reply.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("model_not_found", "invalid_request_error", "model")
    assert "did you mean steady?" in error["message"]


def test_a_request_without_a_model_is_refused_where_there_are_several(shared: Daemon) -> None:
    body = chat()
    del body["model"]
    assert shared.post(CHAT, body).json()["error"]["code"] == "model_required"


def test_a_full_queue_refuses_and_says_when_to_come_back(shared: Daemon) -> None:
    shared.wait_for("narrow")
    with shared.stream("narrow", 50) as stream:
        stream.skip(1)
        second = shared.chat_soon("narrow", 1)
        until(lambda: shared.look("narrow")["waiting"] == 1, "the second waits")
        third = shared.chat("narrow")
        assert third.status == 429
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert int(third.headers["Retry-After"]) >= 1
        assert list(stream)[-1] == "[DONE]"
        assert second.result().status == 200


def test_waiting_too_long_ends_in_504_that_says_why(shared: Daemon) -> None:
    start = time.monotonic()
    reply = shared.chat("slow")
    assert 0.3 <= time.monotonic() - start < 3
    assert reply.status == 504
    assert "queue.max_wait" in reply.json()["error"]["message"]
    assert "slow-1 is" in reply.json()["error"]["message"]
    assert reply.headers["Retry-After"]
    assert shared.look("slow")["waiting"] == 0


def test_first_come_first_served(tmp_path: Path) -> None:
    with running(
        tmp_path, {"a": model(parallel=1, run="on-demand", env={"STANDIN_LOAD_S": 0.3, "STANDIN_TOKEN_S": 0.01})}
    ) as daemon:
        ended: list[int] = []
        asked = []
        for number in range(6):
            asked.append(daemon.threads.submit(lambda number=number: (daemon.chat("a", 3), ended.append(number))))
            until(lambda number=number: daemon.look()["waiting"] == number + 1, "it waits")
        for one in asked:
            one.result()
        assert ended == sorted(ended)


def test_replicas_share_the_requests(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(parallel=1, replicas=2)}) as daemon:
        until(lambda: [i["state"] for i in daemon.look()["instances"]] == ["ready", "ready"], "both are ready")
        with daemon.stream("a", 100) as one, daemon.stream("a", 100) as other:
            assert {s.response.headers["X-Offloadd-Instance"] for s in (one, other)} == {"a-1", "a-2"}


def test_memory_is_made_for_whoever_waits(tmp_path: Path) -> None:
    small = {"run": "on-demand", "vram": "300MiB"}
    budget = {"host": {"limit": "500MiB"}}
    with running(tmp_path, {"a": model(**small), "b": model(**small)}, budget=budget) as daemon:
        assert daemon.chat("a").status == 200
        assert elapsed(lambda: daemon.chat("b")) < 10
        assert daemon.look("b")["state"] == "ready"
        until(lambda: daemon.look("a")["state"] == "off", "a has left")
        assert "make room for b" in daemon.look("a")["last_exit"]["message"]
