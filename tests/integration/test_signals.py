"""Engines' own queues under the whole daemon: what others ask of an instance sends our requests to the other one."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offloadd.ctl.show import backends_table
from tests.conformance.processes import until
from tests.integration.daemon import CHAT, HELLO, Daemon, marks
from tests.integration.engines import daemon_of, served_by
from tests.integration.gpu import environ


def strangers(daemon: Daemon, name: str, count: int) -> list[http.client.HTTPConnection]:
    """So many requests on the first instance that do not come through us, as from somebody who knows its key."""
    (first,) = (each for each in daemon.look(name)["instances"] if each["instance"] == f"{name}-1")
    headers = {"Authorization": f"Bearer {environ(first['pid'])['VLLM_API_KEY']}", "Content-Type": "application/json"}
    body = json.dumps({"model": name, "messages": HELLO, "max_tokens": 3000, "stream": True})
    found = []
    for _ in range(count):
        connection = http.client.HTTPConnection("127.0.0.1", first["port"], timeout=30)
        connection.request("POST", CHAT, body, headers)
        found.append(connection)
    return found


def said(text: str) -> list[dict[str, str]]:
    """A conversation that nobody knows yet."""
    return [{"role": "user", "content": text}]


def test_a_replica_that_others_use_is_the_second_choice_and_none_is_asked_when_it_does_not_matter(tmp_path: Path) -> None:
    marked = tmp_path / "marks"
    env: dict[str, Any] = {"STANDIN_MARK_FILE": str(marked), "STANDIN_TOKEN_S": "0.02"}
    one = served_by("vllm", run="always", replicas={"min": 2, "max": 2}, parallel=8, env=env)

    def polls() -> int:
        return sum(line == "request GET /metrics" for line in marks(marked))

    with daemon_of(tmp_path, {"v": one}, patches={"offloadd.runtime.signals.EVERY": 0.2}) as daemon:
        until(lambda: [each["state"] for each in daemon.look("v")["instances"]] == ["ready", "ready"], "both are ready", 60)
        crowd = strangers(daemon, "v", 4)
        assert polls() == 0
        with daemon.stream("v", 3000, messages=said("one")) as first, daemon.stream("v", 3000, messages=said("two")) as second:
            assert [held.response.getheader("X-Offloadd-Instance") for held in (first, second)] == ["v-1", "v-2"]
            until(lambda: polls() >= 6, "they are asked")
            reply = daemon.chat("v", messages=said("three"))
            assert reply.headers["X-Offloadd-Instance"] == "v-2"  # with as many of ours on each, it would be the first
        for connection in crowd:
            connection.close()
        until(lambda: daemon.load("v") == 0, "nothing runs")
        time.sleep(0.5)  # a round that was under way ends
        settled = polls()
        time.sleep(1)  # five rounds
        assert polls() == settled
        with daemon.stream("v", 3000):
            until(lambda: polls() > settled, "asked again while something runs")


def test_what_an_engine_says_is_shown_to_whoever_looks(tmp_path: Path) -> None:
    """Also of the only instance of a model, about which there is nothing to choose."""
    marked = tmp_path / "marks"
    env: dict[str, Any] = {"STANDIN_MARK_FILE": str(marked), "STANDIN_TOKEN_S": "0.02"}
    models = {"v": served_by("vllm", run="always", parallel=8, env=env), "own": served_by("own", run="always")}

    def polls() -> int:
        return sum(line == "request GET /metrics" for line in marks(marked))

    def shown(engine: str = "vllm") -> Any:
        (instance,) = daemon.get(f"/backends/{engine}")["instances"]
        return instance["signals"]

    def samples() -> dict[str, float]:
        text = daemon.request("GET", "/metrics").body.decode()
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(tuple(f"offloadd_engine_{kind}" for kind in ("running", "waiting", "kv")))
        ]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    patches = {"offloadd.runtime.signals.EVERY": 0.2, "offloadd.runtime.signals.LOOKED_ON": 1.0}
    with daemon_of(tmp_path, models, patches=patches) as daemon:
        for name in models:
            daemon.wait_for(name)
        assert shown() is None, "nothing runs"
        crowd = strangers(daemon, "v", 2)
        with daemon.stream("v", 3000, messages=said("one")):
            found = until(lambda: told if (told := shown()) and told["running"] == 3 else None, "it is shown")
            assert (found["waiting"], 0 <= found["kv_cache"] <= 1) == (0, True)
            assert abs(found["at"] - time.time()) < 30
            (row,) = (row for row in daemon.get("/models")["data"] if row["id"] == "v")
            assert row["offloadd"]["instances"][0]["signals"]["running"] == 3
            labels = '{backend="vllm",instance_id="v-1",model="v"}'
            kinds = ("running_requests", "waiting_requests", "kv_cache_usage_ratio")
            told = until(lambda: read if len(read := samples()) == 3 else None, "it is scraped")
            assert list(told) == [f"offloadd_engine_{kind}{labels}" for kind in kinds]
            assert told[f"offloadd_engine_running_requests{labels}"] == 3
            cells = backends_table(daemon.get("/backends"))
            row_of = list(cells.columns[0].cells).index("vllm")
            assert [list(column.cells)[row_of] for column in cells.columns if column.header in ("runs", "holds")] == ["3", "0"]
            assert shown("own") is None, "no adapter knows how to ask it"
            until(lambda: settled(polls), "nobody looks any more, and it is not asked any more")
            assert daemon.look("v")["instances"][0]["signals"] is None
        for connection in crowd:
            connection.close()


def settled(count: Callable[[], int]) -> bool:
    before = count()
    time.sleep(1)  # five rounds
    return count() == before
