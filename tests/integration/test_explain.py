"""Why it waits, why it was evicted, what became of a request: asked of a real daemon; and events as they happen."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.conformance.servers import HOST, until
from tests.integration.daemon import CHAT, Daemon, chat, model, running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Two models of which only one fits."""
    models = {name: model(run="on-demand", vram="64MiB", env={"STANDIN_LOAD_S": 0.2}) for name in ("first", "second")}
    with running(tmp_path_factory.mktemp("explain"), models, budget={"host": {"limit": "100MiB"}}) as daemon:
        yield daemon


def follow(daemon: Daemon, path: str = "/events") -> Generator[dict[str, Any], None, None]:
    connection = http.client.HTTPConnection(HOST, daemon.port, timeout=30)
    connection.request("GET", path)
    with contextlib.closing(connection), connection.getresponse() as response:
        assert response.getheader("Content-Type") == "text/event-stream"
        assert response.readline().startswith(b":")
        while line := response.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def test_a_requests_way_is_told_by_its_id_and_the_eviction_it_caused_by_model_and_instance(shared: Daemon) -> None:
    assert shared.chat("first").status == 200
    events = follow(shared)
    asked = shared.threads.submit(lambda: list(itertools.islice(events, 6)))
    until(lambda: asked.running(), "somebody listens")
    reply = shared.request("POST", CHAT, chat("second"), {"X-Request-Id": "my-request"})
    assert reply.status == 200
    way = shared.get("/explain?request=my-request")
    wait, end = way["history"]
    assert (way["model"], wait["kind"], end["kind"]) == ("second", "request-waits", "request-ended")
    assert "answered with 200 by second-1" in end["message"]
    assert end["data"]["fate"] == "answered"
    assert any("waits: needs 64.0 MiB on host" in each["message"] for each in way["meanwhile"])

    first = shared.get("/explain/first")
    assert first["state"] == "off"
    stopped = [each for each in first["history"] if each["kind"] == "instance-stopping"]
    assert [each["message"] for each in stopped] == ["first-1: stopping (evicted): to make room for second (1 request waits)"]
    assert [each["id"] for each in shared.get("/explain?instance=first-1")["history"]] == [
        each["id"] for each in first["history"] if each.get("instance") == "first-1"
    ]
    heard = asked.result(timeout=30)
    events.close()
    assert {"decision", "instance-stopping"} <= {event["kind"] for event in heard}
    ids = [event["id"] for event in heard]
    assert ids == sorted(ids)


def test_everything_is_explained_at_once_within_a_limit(shared: Daemon) -> None:
    shared.chat("first")
    found = shared.get("/explain?limit=3")
    assert [each["model"] for each in found["decisions"]] == ["first", "second"]
    assert len(found["history"]) == 3
    assert all(each["reason"] for each in found["decisions"])


def test_what_cannot_be_explained_is_said(shared: Daemon) -> None:
    assert shared.request("GET", "/explain?request=nobody").status == 404
    assert shared.request("GET", "/explain/nobody").status == 404
    assert shared.request("GET", "/explain?limit=0").status == 400
    assert shared.request("GET", "/events?model=nobody").status == 404
