"""vLLM's sleep under the whole daemon: the bytes leave the card and come back; what fails ends in an ordinary stop or start."""

from __future__ import annotations

import contextlib
import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conformance.processes import until
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, alive, marks
from tests.integration.gpu import GIB, MIB, Watch, cards, held, restart_on
from tests.integration.test_engine_memory import on, on_cards

ASLEEP = 256 * MIB
"""What the stand-in holds asleep."""
PROMISED_ASLEEP = 2 * GIB
"""What offloadd expects it to hold, without being told otherwise."""


def sleepy(gib: float, level: int = 1, **changes: Any) -> dict[str, Any]:
    """A model on demand that is put to sleep when it was idle for a second."""
    usual = {"run": "on-demand", "idle_timeout": "1s", "vllm": {"sleep": level}}
    return on("vllm", gib, **{**usual, **changes})


def slept(daemon: Daemon, name: str = "v") -> Any:
    """Wait until it sleeps, as its GPU shows; what /models/{name} says then."""
    return until(lambda: seen if " sleeps on " in (seen := daemon.look(name))["reason"] else None, f"{name} sleeps", 40)


@contextlib.contextmanager
def used_once(nvml: FakeNvml, folder: Path, models: dict[str, Any], **options: Any) -> Iterator[Daemon]:
    """A daemon whose models have answered one request each."""
    with on_cards(nvml, folder, models, **options) as daemon:
        for name in models:
            assert daemon.chat(name).status == 200
        yield daemon


def promised(daemon: Daemon) -> list[int]:
    """Bytes by card; none before the cards have been read."""
    devices = daemon.get("/vram/status")["devices"]
    return [device["reserved_bytes"] for device in devices if device["kind"] == "nvidia"]


def answer(daemon: Daemon, name: str = "v") -> str:
    reply = daemon.chat(name)
    assert reply.status == 200, reply
    return str(reply.json()["choices"][0]["message"]["content"])


def counted(daemon: Daemon, name: str) -> float:
    """A counter of the model v in /metrics."""
    rows = daemon.request("GET", "/metrics").body.decode().splitlines()
    return sum(float(row.rpartition(" ")[2]) for row in rows if row.startswith(f'{name}{{backend="vllm",model="v"}}'))


@pytest.mark.parametrize(("level", "orders"), [(1, ["wake"]), (2, ["wake weights", "reload", "wake kv_cache"])])
def test_it_gives_its_memory_back_when_idle_and_takes_it_again_for_a_request(level: int, orders: list[str], tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    marked = tmp_path / "marks"
    models = {"v": sleepy(8, level, env={"STANDIN_MARK_FILE": marked})}
    with used_once(nvml, tmp_path, models) as daemon:
        (full,) = held(nvml)
        before = daemon.pid("v") if daemon.state("v") == "ready" else daemon.pids("v")[0]
        found = slept(daemon)
        assert full > 7 * GIB
        assert held(nvml) == [ASLEEP]
        assert promised(daemon) == [PROMISED_ASLEEP]
        assert "sleeps on vllm with" in found["reason"]
        assert "needs 6.0 GiB more to wake" in found["reason"]
        assert found["instances"][0]["awake_bytes"] - found["instances"][0]["reserved_bytes"] == 6 * GIB
        words = answer(daemon)
        assert "!" not in words  # its weights are what they were
        assert daemon.pids("v") == [before]
        assert held(nvml) == [full]
        done = [line for line in marks(marked) if line.split()[0] in ("sleep", "wake", "reload")]
        assert done[: 1 + len(orders)] == [f"sleep {level}", *orders]
        assert counted(daemon, "offloadd_instance_sleeps_total") >= 1
        assert counted(daemon, "offloadd_instance_wake_seconds_count") == 1
        assert daemon.get("/health")["problems"] == []


def test_no_client_reaches_what_the_development_mode_opens(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with used_once(nvml, tmp_path, {"v": sleepy(8, idle_timeout="1h")}) as daemon:
        for path in ("sleep?level=2", "wake_up", "collective_rpc", "/sleep", "%73leep", "is_sleeping"):
            reply = daemon.request("POST", f"/upstream/v/{path}", {})
            assert (reply.status, reply.json()["error"]["code"]) == (403, "path_not_allowed"), path
        assert daemon.request("GET", "/upstream/v/version").status == 200
        assert daemon.state("v") == "ready"


def test_two_that_do_not_fit_together_take_turns_without_a_load(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    models = {name: sleepy(14, idle_timeout="1h") for name in ("v", "w")}
    with on_cards(nvml, tmp_path, models) as daemon, Watch(daemon, nvml) as watch:
        for name in ("v", "w", "v", "w"):
            assert answer(daemon, name)
        assert [daemon.launches(name) for name in models] == [1, 1]
        assert watch.wrong == []
        assert watch.fullest > 13 * GIB


def test_it_is_stopped_when_even_what_it_holds_asleep_is_needed(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    models = {"v": sleepy(8), "large": on("vllm", 21.5, run="on-demand", idle_timeout="1h")}
    with on_cards(nvml, tmp_path, models) as daemon:
        assert daemon.chat("v").status == 200
        slept(daemon)
        assert daemon.chat("large").status == 200
        assert daemon.state("v") == "off"
        assert daemon.look("v")["last_exit"]["message"] == "to make room for large (1 request waits)"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"STANDIN_SLEEP_KEEPS": 1}, "it says that it sleeps, and holds "),
        ({"STANDIN_SLEEP": "fails"}, "it cannot be put to sleep: /sleep?level=1&mode=wait: status 500"),
        ({"STANDIN_SLEEP": "hangs"}, "it has not fallen asleep in "),
    ],
)
def test_one_that_keeps_its_memory_is_stopped_and_the_problem_is_told(env: dict[str, Any], said: str, tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    patches = {"offloadd.rounds.REFRESH": 0.2, "offloadd.plan.sleep.FREED_WITHIN": 1.0, "offloadd.plan.sleep.FALLS_WITHIN": 3.0}
    with used_once(nvml, tmp_path, {"v": sleepy(8, env=env)}, patches=patches) as daemon:
        until(lambda: daemon.state("v") == "off", "it is stopped", 30)
        until(lambda: held(nvml) == [0], "its memory is back")
        found = daemon.look("v")["last_exit"]
        assert (found["kind"], found["expected"]) == ("sleepless", True)
        assert found["message"].startswith(said)
        (problem,) = daemon.get("/health")["problems"]
        assert problem["what"].startswith("v is stopped where it should sleep, since v-1 did not: ")
        assert daemon.chat("v").status == 200
        until(lambda: daemon.state("v") == "off", "it is stopped again", 30)
        assert daemon.look("v")["last_exit"]["kind"] == "stopped"  # without another try


@pytest.mark.parametrize("how", ["fails", "dies", "hangs"])
def test_one_that_does_not_wake_is_started_anew_for_the_request(how: str, tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with used_once(nvml, tmp_path, {"v": sleepy(8, env={"STANDIN_WAKE": how}, start_timeout="4s")}) as daemon:
        slept(daemon)
        (first,) = daemon.pids("v")
        assert answer(daemon)
        until(lambda: not alive(first), "the old one is gone")
        assert daemon.launches("v") == 2


def test_the_next_daemon_finds_it_asleep_and_wakes_it(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with on_cards(nvml, tmp_path, {"v": sleepy(8)}) as daemon:
        assert daemon.chat("v").status == 200
        slept(daemon)
        (pid,) = daemon.pids("v")
        daemon.signal(signal.SIGKILL)
        daemon.process.wait()
        with restart_on(nvml, daemon, patches={"offloadd.rounds.REFRESH": 0.2}) as second:
            found = slept(second)
            assert found["instances"][0]["pid"] == pid
            until(lambda: promised(second) == [PROMISED_ASLEEP], "it is promised what it holds asleep")
            assert answer(second)
            assert second.pids("v") == [pid]


def test_one_that_fell_asleep_unseen_is_looked_at_before_its_promise_is_lowered(
    tmp_path: Path,
) -> None:
    nvml = cards(tmp_path, 1)
    with on_cards(nvml, tmp_path, {"v": sleepy(8, idle_timeout="1h")}) as daemon:
        assert daemon.chat("v").status == 200
        (pid,) = daemon.pids("v")
        port = daemon.look("v")["instances"][0]["port"]
        daemon.signal(signal.SIGKILL)
        daemon.process.wait()
        _order(port, "/sleep?level=1")
        with restart_on(nvml, daemon, patches={"offloadd.rounds.REFRESH": 0.2}) as second:
            slept(second)
            assert promised(second) == [PROMISED_ASLEEP]
            assert psutil.pid_exists(pid)


def test_one_that_others_have_woken_is_stopped(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    patches = {"offloadd.rounds.REFRESH": 0.2, "offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.5}
    with used_once(nvml, tmp_path, {"v": sleepy(8)}, patches=patches) as daemon:
        found = slept(daemon)
        _order(found["instances"][0]["port"], "/wake_up")
        until(lambda: daemon.state("v") == "off", "it is stopped", 20)
        assert "awake though nobody here woke it" in daemon.look("v")["last_exit"]["message"]


def test_on_the_cpu_it_is_started_without_and_stopped_when_idle(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with used_once(nvml, tmp_path, {"v": sleepy(0.0625, devices="cpu")}) as daemon:
        until(lambda: daemon.state("v") == "off", "it is stopped", 30)
        assert daemon.look("v")["last_exit"]["kind"] == "stopped"


def _order(port: int, path: str) -> None:
    """What anybody on the machine may tell it, since its development endpoints know no key."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps({}).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 200
