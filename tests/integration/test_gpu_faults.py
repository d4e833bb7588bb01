"""Drivers that go away, hang or lose a card: what runs runs on, nothing is started on a guess, and /health says why."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, alive, elapsed
from tests.integration.gpu import GIB, card, cards, gpu_model, gpus_of, launch_on, running_on, wait_card

QUICK = {
    "offloadd.observe.snapshot.READ_TIMEOUT": 0.5,
    "offloadd.rounds.REFRESH": 0.2,
    "offloadd.observe.devices.nvml.FIRST_WAIT": 0.2,
    "offloadd.observe.devices.nvml.FIRST_REVIVAL": 0.3,
}
"""So that a minute's patience is a second's."""
MEMORY = "nvmlDeviceGetMemoryInfo_v2"


@pytest.fixture
def nvml(tmp_path: Path) -> Iterator[FakeNvml]:
    """Two cards of 24 GiB, which answer again at the end."""
    fake = cards(tmp_path)
    yield fake
    change(fake, sleeps={}, init_error=0)


def change(nvml: FakeNvml, **facts: Any) -> None:
    for name, value in facts.items():
        setattr(nvml, name, value)
    nvml.write()


def gpus(daemon: Daemon) -> list[int]:
    """Indexes of the cards that the ledger has."""
    return [each["index"] for each in daemon.get("/vram/status")["devices"] if each["kind"] == "nvidia"]


def problems(daemon: Daemon) -> str:
    """What /health says is wrong; `ok` when it says that all is well."""
    found = daemon.get("/health")
    assert (found["status"] == "ok") == (not found["problems"])
    return "; ".join(problem["what"] for problem in found["problems"]) or "ok"


def wait_problem(daemon: Daemon, text: str) -> str:
    def found() -> str:
        seen = problems(daemon)
        return seen if text in seen else ""

    return str(until(found, f"/health says {text}"))


def wait_reason(daemon: Daemon, name: str, text: str, state: str = "waiting") -> None:
    def found() -> bool:
        seen = daemon.look(name)
        return seen["state"] == state and text in seen["reason"]

    until(found, f"{name} is {state}: {text}")


def test_the_driver_is_lost_and_comes_back(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(10), "b": gpu_model(6)}
    with running_on(nvml, tmp_path, models, patches=QUICK) as daemon:
        assert daemon.chat("a").status == 200
        pid = daemon.pid("a")
        with daemon.stream("a", 2000) as stream:
            stream.skip(2)
            change(nvml, epoch=1, init_error=9)
            assert "reading of nvidia devices failed: NVIDIA driver: " in wait_problem(daemon, "modprobe nvidia")
            until(lambda: gpus(daemon) == [], "cards that cannot be read have no books")
            asked = daemon.chat_soon("b")
            wait_reason(daemon, "b", "waits: needs 6.0 GiB, and nvidia devices cannot be read: failed: NVIDIA driver: ")
            stream.skip(20)
            assert daemon.pid("a") == pid
            assert daemon.chat("a").status == 200
            change(nvml, init_error=0)
            assert asked.result(20).status == 200
            stream.skip(20)
        assert gpus(daemon) == [0, 1]
        assert wait_problem(daemon, "ok") == "ok"
        assert daemon.pid("a") == pid
        assert wait_card(daemon, gpus_of(daemon, nvml, "a")[0], foreign_bytes=nvml.gpus[0].reserved)["foreign"] == []


def test_a_reading_hangs(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(10), "b": gpu_model(6)}
    with running_on(nvml, tmp_path, models, patches=QUICK) as daemon:
        assert daemon.chat("a").status == 200
        pid = daemon.pid("a")
        with daemon.stream("a", 2000) as stream:
            stream.skip(2)
            change(nvml, sleeps={MEMORY: 600.0})
            wait_problem(daemon, "reading of nvidia devices gave nothing within 0.5 s")
            wait_problem(daemon, "reading of nvidia devices has not returned for longer than its deadline")
            until(lambda: gpus(daemon) == [], "cards that cannot be read have no books")
            asked = daemon.chat_soon("b")
            wait_reason(daemon, "b", "waits: needs 6.0 GiB, and nvidia devices cannot be read: ")
            # Nobody waits for it: neither the stream nor whoever looks.
            assert elapsed(lambda: stream.skip(50)) < 5
            assert elapsed(lambda: daemon.get("/vram/status")) < 1
            assert daemon.chat("a").status == 200
            count = nvml.count(MEMORY)
            change(nvml, sleeps={})
            assert asked.result(20).status == 200
            assert count == 1 or nvml.count(MEMORY) > count
        assert wait_problem(daemon, "ok") == "ok"
        assert daemon.pid("a") == pid


def test_a_card_falls_off_the_bus(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {
        "here": gpu_model(16, devices=[0]),
        "there": gpu_model(4, devices=[1]),
        "more": gpu_model(5),
        "lost": gpu_model(2, devices=[nvml.gpus[0].uuid]),
    }
    with running_on(nvml, tmp_path, models, patches=QUICK) as daemon:
        assert daemon.chat("here").status == daemon.chat("there").status == 200
        pids = daemon.pid("here"), daemon.pid("there")
        nvml.gpus[0].errors = {"*": 15}
        nvml.write()
        wait_problem(daemon, f"device {nvml.gpus[0].uuid}")
        until(lambda: gpus(daemon) == [1], "it has no books")
        # It would have had the best fit on the first card.
        assert daemon.chat("more").status == 200
        assert gpus_of(daemon, nvml, "more") == [1]
        asked = daemon.chat_soon("lost")
        wait_reason(daemon, "lost", f"there is no device {nvml.gpus[0].uuid}")
        assert daemon.chat("there").status == daemon.chat("here").status == 200
        assert (daemon.pid("here"), daemon.pid("there")) == pids
        nvml.gpus[0].errors = {}
        nvml.write()
        assert asked.result(20).status == 200
        assert wait_problem(daemon, "ok") == "ok"
        assert card(daemon, 0)["reserved_bytes"] == 18 * GIB
        assert daemon.pid("here") == pids[0]


@pytest.mark.parametrize(("code", "hint"), [(9, "modprobe nvidia"), (18, "the driver was updated while it was loaded")])
def test_a_start_without_a_driver_is_no_reason_to_use_the_cpu(nvml: FakeNvml, tmp_path: Path, code: int, hint: str) -> None:
    change(nvml, init_error=code)
    models = {"gpu": gpu_model(1, run="always"), "cpu": gpu_model(0.5, run="always", devices="cpu")}
    with running_on(nvml, tmp_path, models, patches=QUICK) as daemon:
        daemon.wait_for("cpu")
        wait_reason(daemon, "gpu", hint)
        assert hint in wait_problem(daemon, "reading of nvidia devices failed")
        assert daemon.pids("gpu") == []
        assert daemon.look("gpu")["fits"] == "unknown"
        change(nvml, init_error=0)
        daemon.wait_for("gpu")
        assert wait_problem(daemon, "ok") == "ok"


def test_a_hung_reading_holds_up_no_end(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(10, run="always")}
    with running_on(nvml, tmp_path, models) as daemon:
        pid = daemon.pid()
        wait_card(daemon, 0, used_bytes=10 * GIB + nvml.gpus[0].reserved)
        calls = nvml.count(MEMORY)
        change(nvml, sleeps={MEMORY: 600.0})
        until(lambda: nvml.count(MEMORY) > calls, "a reading hangs")
        daemon.term()
        assert elapsed(lambda: daemon.exit(5)) < 3
        assert daemon.process.returncode == 0
        assert not alive(pid)


def test_memory_on_its_way_back_holds_up_no_end(nvml: FakeNvml, tmp_path: Path) -> None:
    change(nvml, release_lag_ms=60_000)
    models = {"a": gpu_model(10, run="always")}
    with running_on(nvml, tmp_path, models) as daemon:
        daemon.wait_for()
        wait_card(daemon, 0, used_bytes=10 * GIB + nvml.gpus[0].reserved)
        daemon.term()
        assert elapsed(lambda: daemon.exit(5)) < 3
        assert daemon.process.returncode == 0


def test_a_driver_that_hangs_at_the_start_does_not_keep_the_port_shut_for_ever(nvml: FakeNvml, tmp_path: Path) -> None:
    change(nvml, sleeps={"nvmlInitWithFlags": 600.0})
    models = {"gpu": gpu_model(1, run="always"), "cpu": gpu_model(0.5, run="always", devices="cpu")}
    daemon = launch_on(nvml, tmp_path, models, patches=QUICK)
    try:
        began = time.monotonic()
        until(lambda: "listening on" in daemon.log, "it listens")
        assert time.monotonic() - began < 8
        daemon.wait_for("cpu")
        wait_reason(daemon, "gpu", "nvidia devices cannot be read: ")
        change(nvml, sleeps={})
        daemon.wait_for("gpu")
        daemon.close()
    finally:
        daemon.discard()
        print(daemon.log)
