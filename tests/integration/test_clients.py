"""Clients that leave: while they wait, during a stream, during an answer that is none; and clients that read slowly."""

from __future__ import annotations

import http.client
import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.conformance.servers import until
from tests.integration.daemon import CHAT, Daemon, alive, chat, marks, model, running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("shared")
    models = {
        name: model(parallel=parallel, env={"STANDIN_TOKEN_S": 0.02, "STANDIN_MARK_FILE": folder / name})
        for name, parallel in (("narrow", 1), ("streams", 2), ("plain", 2), ("both", 2))
    }
    models["loading"] = model(run="on-demand", env={"STANDIN_LOAD_S": 600})
    models["fast"] = model(context=1_000_000, env={"STANDIN_TOKEN_S": 0})
    models["stuck"] = model(
        env={"STANDIN_HANG_AFTER_READY": 0.3, "STANDIN_MARK_FILE": folder / "stuck"}, llamacpp={"embeddings": True}, parallel=1
    )
    with running(folder, models) as daemon:
        for name in models:
            if name != "loading":
                daemon.wait_for(name)
        yield daemon


def happened(daemon: Daemon, name: str, text: str) -> list[str]:
    return [line for line in marks(daemon.folder / name) if line.startswith(text)]


def test_leaving_the_queue_frees_the_place_in_it(shared: Daemon) -> None:
    with shared.stream("narrow", 500) as stream:
        stream.skip(1)
        first, second = shared.begin(CHAT, chat("narrow")), shared.begin(CHAT, chat("narrow"))
        until(lambda: shared.look("narrow")["waiting"] == 2, "both wait")
        first.close()
        until(lambda: shared.look("narrow")["waiting"] == 1, "one has left", 1)
        second.close()
        until(lambda: shared.look("narrow")["waiting"] == 0, "both have left", 1)
        assert shared.load("narrow") == 1
    until(lambda: shared.load("narrow") == 0, "the stream has ended too", 1)
    assert not happened(shared, "narrow", "completed")
    assert shared.chat("narrow", 1).status == 200


def test_leaving_during_a_load(shared: Daemon) -> None:
    connection = shared.begin(CHAT, chat("loading"))
    until(lambda: shared.look("loading")["waiting"] == 1, "it waits")
    connection.close()
    until(lambda: shared.look("loading")["waiting"] == 0, "it has left", 1)


def test_leaving_a_stream_ends_the_work(shared: Daemon) -> None:
    with shared.stream("streams", 500) as stream:
        stream.skip(3)
        assert shared.load("streams") == 1
    (line,) = until(lambda: happened(shared, "streams", "cancelled"), "the work is cancelled", 1)
    assert line.startswith("cancelled stream")
    until(lambda: shared.load("streams") == 0, "the lease is back", 1)


def test_leaving_an_answer_that_is_no_stream_ends_the_work_too(shared: Daemon) -> None:
    """The engine would work on; so the gateway asks it for a stream, and puts the answer together."""
    connection = shared.begin(CHAT, chat("plain", 500))
    until(lambda: shared.load("plain") == 1 and happened(shared, "plain", "request POST"), "it runs")
    connection.close()
    (line,) = until(lambda: happened(shared, "plain", "cancelled"), "the work is cancelled", 1)
    assert line.startswith("cancelled stream")
    until(lambda: shared.load("plain") == 0, "the lease is back", 1)


def test_work_that_cannot_be_cancelled_keeps_its_lease(shared: Daemon) -> None:
    connection = shared.begin(CHAT, chat("both", 20, timings_per_token=True))
    until(lambda: shared.load("both") == 1, "it runs")
    connection.close()
    until(lambda: shared.load("both") == 0, "the lease is back")
    assert happened(shared, "both", "completed plain 20")
    assert not happened(shared, "both", "cancelled")


def test_embeddings_keep_their_lease_until_their_end(shared: Daemon) -> None:
    (instance,) = shared.look("stuck")["instances"]
    until(lambda: not answers(shared, instance["port"]), "it hangs")
    connection = shared.begin("/v1/embeddings", {"model": "stuck", "input": "hello"})
    until(lambda: happened(shared, "stuck", "request POST /v1/embeddings"), "it has arrived")
    connection.close()
    waiting = shared.begin("/v1/embeddings", {"model": "stuck", "input": "hello"})
    until(lambda: shared.look("stuck")["waiting"] == 1, "the next waits")
    assert shared.load("stuck") == 1
    os.kill(instance["pid"], signal.SIGKILL)
    until(lambda: not alive(instance["pid"]), "it ends")
    assert waiting.getresponse().status == 200
    until(lambda: shared.load("stuck") == 0, "all leases are back", 2)
    waiting.close()


def answers(daemon: Daemon, port: int) -> bool:
    """Whether a stand-in's main loop turns."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.2)
    try:
        connection.request("GET", "/slots")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_a_slow_reader_slows_its_stream_and_fills_no_memory(shared: Daemon) -> None:
    def made() -> int:
        return int(shared.get("/upstream/fast/slots")[0]["next_token"][0]["n_decoded"])

    before = psutil.Process(shared.process.pid).memory_info().rss
    with shared.stream("fast", 900_000) as stream:
        stream.skip(1)
        last = [made()]

        def still() -> bool:
            last.append(made())
            return len(last) > 20 and last[-1] == last[-20]

        until(still, "the backend is held up", 20)
        assert psutil.Process(shared.process.pid).memory_info().rss - before < 32 * 2**20
        stream.skip(2000)
    until(lambda: shared.load("fast") == 0, "the lease is back", 1)


def test_many_come_and_go(shared: Daemon) -> None:
    """Whatever the moment at which they leave, no lease and no place is lost."""
    connections = [shared.begin(CHAT, chat("streams", 50, stream=number % 2 == 0)) for number in range(40)]
    for connection in connections:
        connection.close()
    until(lambda: shared.load("streams") == 0 and shared.look("streams")["waiting"] == 0, "all are gone")
    assert shared.chat("streams", 2).status == 200


def test_half_a_body_is_no_request(shared: Daemon) -> None:
    connection = shared.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b'{"model": "streams"')
    connection.close()
    assert shared.chat("streams", 2).status == 200
