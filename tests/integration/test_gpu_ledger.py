"""The memory of GPUs under a whole daemon: where models go, who leaves for whom, and what the ledger says of it."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.servers import until
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, alive, elapsed
from tests.integration.gpu import (
    GIB,
    LIMIT,
    MIB,
    Watch,
    argv,
    card,
    cards,
    environ,
    gpu_model,
    gpus_of,
    held,
    layered_gguf,
    option,
    places,
    process_holding,
    restart_on,
    running_on,
    wait_card,
)

RELEASE_TIME = "offloadd.plan.upkeep.RELEASE_TIME"
LONG = bool(os.environ.get("OFFLOADD_LONG"))


@pytest.fixture
def nvml(tmp_path: Path) -> FakeNvml:
    """Two cards of 24 GiB."""
    return cards(tmp_path)


def served(daemon: Daemon, *names: str) -> None:
    """Have each model answer, in this order."""
    for name in names:
        reply = daemon.chat(name)
        assert reply.status == 200, reply


# Placement


def test_models_go_where_the_least_room_is_left_and_see_that_card_only(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"twelve": gpu_model(12), "fifteen": gpu_model(15), "five": gpu_model(5), "seven": gpu_model(7)}
    with running_on(nvml, tmp_path, models) as daemon:
        served(daemon, "twelve", "fifteen", "five", "seven")
        assert {name: gpus_of(daemon, nvml, name) for name in models} == {"twelve": [0], "fifteen": [1], "five": [1], "seven": [0]}
        for name, index in (("twelve", 0), ("fifteen", 1), ("five", 1)):
            pid = daemon.pid(name)
            seen = environ(pid)
            assert seen["CUDA_VISIBLE_DEVICES"] == seen["ROCR_VISIBLE_DEVICES"] == nvml.gpus[index].uuid
            assert option(pid, "--n-gpu-layers") == "all"
            assert option(pid, "--split-mode") == "none"
        assert [daemon.launches(name) for name in models] == [1, 1, 1, 1]


def test_a_model_too_large_for_one_card_is_divided(nvml: FakeNvml, tmp_path: Path) -> None:
    layered_gguf(tmp_path / "large.gguf", 40, 800)
    models = {"large": gpu_model(1, takes=32, source="large.gguf", vram="auto")}
    with running_on(nvml, tmp_path, models) as daemon:
        assert daemon.look("large")["fits"] == "now"
        served(daemon, "large")
        pid = daemon.pid("large")
        assert environ(pid)["CUDA_VISIBLE_DEVICES"].split(",") == [gpu.uuid for gpu in nvml.gpus]
        assert option(pid, "--split-mode") == "layer"
        counts = [int(part) for part in option(pid, "--tensor-split").split(",")]
        assert sum(counts) == 41
        assert gpus_of(daemon, nvml, "large") == [0, 1]
        for index, count in enumerate(counts):
            (share,) = card(daemon, index)["instances"]
            assert share["reserved_bytes"] >= (count - index) * 800 * MIB  # the last one is the small output layer
            expected = 32 * GIB * count // 41
            measured = wait_card(daemon, index, used_bytes=expected + nvml.gpus[index].reserved)["instances"][0]["measured_bytes"]
            assert measured == expected


def test_a_partial_model_leaves_on_the_cpu_what_does_not_fit(nvml: FakeNvml, tmp_path: Path) -> None:
    layered_gguf(tmp_path / "layers.gguf", 20, 300)
    models = {"part": gpu_model(1, takes=3, source="layers.gguf", vram="auto", devices=[0], partial=True)}
    with running_on(nvml, tmp_path, models, budget={"gpus": {"0": {"limit": "4GiB", "reserve": "0MiB"}}}) as daemon:
        served(daemon, "part")
        layers = int(option(daemon.pid("part"), "--n-gpu-layers"))
        assert 5 < layers <= 12
        held_where = places(daemon, "part")
        assert held_where[nvml.gpus[0].uuid] <= 4 * GIB
        assert held_where["host"] > (20 - layers) * 300 * MIB
    del models["part"]["partial"]
    (tmp_path / "whole").mkdir()
    layered_gguf(tmp_path / "whole" / "layers.gguf", 20, 300)
    with running_on(nvml, tmp_path / "whole", models, budget={"gpus": {"0": {"limit": "4GiB", "reserve": "0MiB"}}}) as daemon:
        reply = daemon.chat("part")
        assert reply.status == 503
        assert "more than its limit of 4.0 GiB" in reply.json()["error"]["message"]
        assert daemon.look("part")["fits"] == "never"


def test_devices_as_the_config_names_them(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {
        "plain": gpu_model(0.5, devices="cpu"),
        "none": gpu_model(0.5, gpu_layers=0),
        "by-index": gpu_model(5, devices=[1]),
        "by-uuid": gpu_model(5, devices=[nvml.gpus[1].uuid]),
        "first": gpu_model(5, devices=[0]),
        "missing": gpu_model(5, devices=[7]),
    }
    with running_on(nvml, tmp_path, models) as daemon:
        served(daemon, "plain", "none")
        for name in ("plain", "none"):
            pid = daemon.pid(name)
            assert environ(pid)["CUDA_VISIBLE_DEVICES"] == ""
            assert option(pid, "--device") == "none"
            assert list(places(daemon, name)) == ["host"]
        assert held(nvml) == [0, 0]
        served(daemon, "by-index", "by-uuid", "first")
        assert gpus_of(daemon, nvml, "by-index") == gpus_of(daemon, nvml, "by-uuid") == [1]
        assert gpus_of(daemon, nvml, "first") == [0]
        asked = daemon.chat_soon("missing", 1)
        reason = until(lambda: (found := daemon.look("missing"))["state"] == "waiting" and found["reason"], "it waits")
        assert "there is no device 7" in reason
        assert not asked.done()


# What the ledger says


def test_the_ledger_and_the_metrics_tell_who_holds_what(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"more": gpu_model(4, takes=4.25), "less": gpu_model(6, takes=5, devices=[0])}
    budget = {"gpus": {"1": {"limit": "10GiB", "reserve": "1GiB"}}}
    with (
        process_holding(nvml, 0, 3) as large,
        process_holding(nvml, 0, 1) as small,
        running_on(nvml, tmp_path, models, budget=budget) as daemon,
    ):
        served(daemon, "less", "more")
        found = wait_card(daemon, 0, used_bytes=int(9.5 * GIB))
        assert found["limit_bytes"] == LIMIT
        assert [(share["model"], share["reserved_bytes"], share["measured_bytes"]) for share in found["instances"]] == [
            ("less", 6 * GIB, 5 * GIB)
        ]
        assert found["foreign"] == [
            {"pid": large, "name": "sleep", "bytes": 3 * GIB},
            {"pid": small, "name": "sleep", "bytes": GIB},
        ]
        assert found["foreign_bytes"] == 4 * GIB + nvml.gpus[0].reserved
        # Less what is used and what is promised and not yet taken: 23.5 - 3 - 1 - 5 - 1.
        assert found["free_bytes"] == 14.5 * GIB
        assert found["room_bytes"] == min(13.5 * GIB, LIMIT - 6 * GIB)
        other = wait_card(daemon, 1, used_bytes=int(4.75 * GIB))
        assert (other["limit_bytes"], other["reserved_bytes"], other["room_bytes"]) == (9 * GIB, 4 * GIB, 5 * GIB)
        assert other["instances"][0]["measured_bytes"] == other["instances"][0]["peak_bytes"] == 4.25 * GIB
        status = daemon.get("/vram/status")
        assert status["totals"]["reserved_bytes"] == sum(each["reserved_bytes"] for each in status["devices"])
        _agree(daemon)


def _agree(daemon: Daemon) -> None:
    """Every number of the ledger is a metric, and the same; those of RAM may change in between."""
    status, text = daemon.get("/vram/status"), daemon.request("GET", "/metrics").body.decode()
    seen = {
        (sample.name, *(sample.labels.get(label, "") for label in ("device", "instance_id"))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    renamed = {"utilization": "utilization_ratio", "temperature_c": "temperature_celsius", "power_w": "power_watts"}
    for device in (each for each in status["devices"] if each["kind"] == "nvidia"):
        for key in [key for key in device if key.endswith("_bytes")] + list(renamed):
            assert seen[f"offloadd_device_{renamed.get(key, key)}", device["id"], ""] == device[key], key
        for share in device["instances"]:
            for key in ("reserved_bytes", "measured_bytes", "peak_bytes"):
                assert seen[f"offloadd_instance_{key}", device["id"], share["instance"]] == share[key]


def test_an_instance_that_drains_is_still_ours(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(10), "b": gpu_model(9)}
    with running_on(nvml, tmp_path, models) as daemon:
        with daemon.stream("a", 2000) as stream:
            stream.skip(2)
            wait_card(daemon, 0, used_bytes=10 * GIB + nvml.gpus[0].reserved)
            daemon.apply({"b": gpu_model(9, devices=[0])})
            (share,) = card(daemon)["instances"]
            assert share["instance"] == "a-1"
            calls = nvml.count("nvmlDeviceGetMemoryInfo_v2")
            until(lambda: nvml.count("nvmlDeviceGetMemoryInfo_v2") > calls + 2, "it is read again")
            found = card(daemon)
            assert (found["foreign"], found["foreign_bytes"]) == ([], nvml.gpus[0].reserved)
            assert found["instances"][0]["measured_bytes"] == 10 * GIB
            assert found["releasing_bytes"] == 10 * GIB
            # What it still holds is not counted a second time as promised and not taken: there is room for another beside it.
            served(daemon, "b")
            stream.skip(2)
        until(lambda: card(daemon)["releasing_bytes"] == 0, "it has gone")


# Eviction


def test_an_idle_model_leaves_for_a_waiter_and_a_pinned_one_does_not(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {
        "pinned": gpu_model(8, pinned=True, devices=[0]),
        "idle": gpu_model(10, devices=[0]),
        "waiter": gpu_model(12, devices=[0]),
        "hopeless": gpu_model(15, devices=[0]),
    }
    with running_on(nvml, tmp_path, models) as daemon, Watch(daemon, nvml) as watch:
        served(daemon, "pinned", "idle")
        pid = daemon.pid("pinned")
        # The stay of a second is over soon, and nothing else keeps it.
        assert elapsed(lambda: served(daemon, "waiter")) < 5
        assert daemon.look("idle")["last_exit"]["message"] == "to make room for waiter (1 request waits)"
        asked = daemon.chat_soon("hopeless", 1)
        reason = until(lambda: (found := daemon.look("hopeless"))["state"] == "waiting" and found["reason"], "it waits")
        assert reason == "waits: needs 15.0 GiB on gpu0, 2.3 GiB free, and nothing may be evicted for it now"
        assert daemon.pid("pinned") == pid
        assert daemon.state("waiter") == "ready"
        assert daemon.look("hopeless")["fits"] == "after eviction"
        assert not asked.done()
    assert not watch.wrong


def test_memory_that_comes_back_late_is_waited_for(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.release_lag_ms = 1000
    nvml.write()
    models = {"first": gpu_model(14, devices=[0]), "second": gpu_model(16, devices=[0]), "small": gpu_model(2, devices=[0])}
    with running_on(nvml, tmp_path, models) as daemon, Watch(daemon, nvml) as watch:
        served(daemon, "first")
        wait_card(daemon, 0, used_bytes=14 * GIB + nvml.gpus[0].reserved)
        asked = daemon.chat_soon("second")
        until(lambda: daemon.look("first")["last_exit"], "it ends")
        found = card(daemon)
        assert found["releasing_bytes"] == 14 * GIB
        assert found["foreign_bytes"] == nvml.gpus[0].reserved
        assert daemon.look("second")["reason"] == "waits: needs 16.0 GiB on gpu0, 8.3 GiB free, 14.0 GiB being released"
        # Another that starts meanwhile must not be taken for what has not come back.
        served(daemon, "small")
        assert asked.result().status == 200
    assert not watch.wrong
    assert watch.fullest <= 18 * GIB


def test_memory_that_never_comes_back_becomes_somebody_elses(nvml: FakeNvml, tmp_path: Path) -> None:
    nvml.release_lag_ms = 1_000_000
    nvml.write()
    models = {"first": gpu_model(10, devices=[0]), "second": gpu_model(14, devices=[0]), "fits": gpu_model(12, devices=[0])}
    with running_on(nvml, tmp_path, models, patches={RELEASE_TIME: 1.0}) as daemon, Watch(daemon, nvml) as watch:
        served(daemon, "first")
        wait_card(daemon, 0, used_bytes=10 * GIB + nvml.gpus[0].reserved)
        asked = daemon.chat_soon("second")
        wait_card(daemon, 0, releasing_bytes=10 * GIB)
        found = wait_card(daemon, 0, releasing_bytes=0, reserved_bytes=0)
        assert found["foreign_bytes"] == 10 * GIB + nvml.gpus[0].reserved
        assert found["room_bytes"] == int(13.5 * GIB)
        until(
            lambda: (
                daemon.look("second")["reason"] == "waits: needs 14.0 GiB on gpu0, 13.5 GiB free, and nothing may be evicted "
                "for it now"
            ),
            "it waits for what is short",
        )
        assert not asked.done()
        nvml.release_lag_ms = 0
        nvml.write()
        assert asked.result(10).status == 200
    assert not watch.wrong


# A minute of a whole house


SIZES = {"m5": 5, "m6": 6, "m7": 7, "m8": 8, "m10": 10, "m12": 12, "m16": 16, "m20": 20}
LARGEST = "m20"
BOUND_S = 30.0


def test_random_requests_for_more_models_than_fit(nvml: FakeNvml, tmp_path: Path) -> None:
    seed = int(os.environ.get("OFFLOADD_SEED", "0")) or random.randrange(10**6)
    print(f"OFFLOADD_SEED={seed}")
    nvml.release_lag_ms = 200
    nvml.write()
    queue = {"max_wait": f"{BOUND_S:g}s", "max_waiting": 8}
    models = {name: gpu_model(size, load_s=0.05 + size / 50, queue=queue, parallel=2) for name, size in SIZES.items()}
    with running_on(nvml, tmp_path, models, patches={}) as daemon, Watch(daemon, nvml) as watch:
        house = _House(daemon, nvml, seed)
        house.run(60.0 if LONG else 17.0)
        assert not watch.wrong, watch.wrong[:5]
        print(f"{sum(house.answers.values())} requests {dict(house.answers)}, fullest card {watch.fullest / GIB:.1f} GiB")
        print(f"longest waits { ({name: round(wait, 1) for name, wait in sorted(house.waits.items())}) }")
        print(f"launches { ({name: daemon.launches(name) for name in SIZES}) }, looks {watch.looks}")
        assert {status for _, status in house.answers} <= {200, 429, 503, 504}
        assert house.answers[LARGEST, 200] >= 1
        assert house.answers[LARGEST, 504] == 0
        assert house.waits[LARGEST] <= BOUND_S
        assert {name for name, status in house.answers if status == 200} == set(SIZES)
        assert watch.fullest > 20 * GIB
        assert not [line for line in daemon.log.splitlines() if "out of memory" in line or "crashed" in line]
        until(lambda: not any(each["foreign"] for each in daemon.get("/vram/status")["devices"]), "the foreign program is gone")


class _House:
    """Clients that ask at random, one that insists on the largest model, and a foreign program that comes and goes."""

    def __init__(self, daemon: Daemon, nvml: FakeNvml, seed: int) -> None:
        self._daemon, self._nvml, self._seed = daemon, nvml, seed
        self._open = threading.Event()
        self._open.set()
        self._over = threading.Event()
        self._asking = 0
        self._lock = threading.Lock()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.waits: dict[str, float] = {}

    def run(self, seconds: float) -> None:
        clients = [self._daemon.threads.submit(self._ask_at_random, number) for number in range(5)]
        clients.append(self._daemon.threads.submit(self._ask_for_the_largest))
        end = time.monotonic() + seconds
        try:
            self._over.wait(seconds / 4)
            with self._foreign(random.Random(self._seed)):
                self._over.wait(seconds / 2)
            self._over.wait(max(0.0, end - time.monotonic()))
        finally:
            self._over.set()
            self._open.set()
        for client in clients:
            client.result(BOUND_S + 15)

    def _ask_at_random(self, number: int) -> None:
        rng = random.Random(self._seed * 100 + number)
        while not self._over.is_set():
            self._ask(rng.choice(list(SIZES)), rng.randrange(1, 40))
            self._over.wait(rng.random() * 0.1)

    def _ask_for_the_largest(self) -> None:
        while not self._over.is_set():
            self._ask(LARGEST, 5)
            self._over.wait(0.5)

    def _ask(self, name: str, tokens: int) -> None:
        self._enter()
        begin = time.monotonic()
        reply = self._daemon.chat(name, tokens)
        with self._lock:
            self._asking -= 1
            self.answers[name, reply.status] += 1
            self.waits[name] = max(self.waits.get(name, 0.0), time.monotonic() - begin)

    def _enter(self) -> None:
        """Be counted in the moment in which it is open: one that was let in and not yet counted would ask behind a closed door."""
        while True:
            self._open.wait()
            with self._lock:
                if self._open.is_set():
                    self._asking += 1
                    return

    def _foreign(self, rng: random.Random) -> Any:
        """It takes all that is free on a card while nobody starts, as no driver gives what another process is about to take."""
        with self._lock:
            self._open.clear()
        until(lambda: not self._asking, "those that asked are answered", BOUND_S + 15)
        until(self._all_settled, "nobody is on the way to a place that was promised")
        index = rng.randrange(2)
        free = self._nvml.gpus[index].total - self._nvml.gpus[index].reserved - held(self._nvml)[index]
        entered = _Entered(process_holding(self._nvml, index, min(9.0, free / GIB)))
        until(lambda: card(self._daemon, index)["foreign"], "it is seen")
        self._open.set()
        return entered

    def _all_settled(self) -> bool:
        states = [each["state"] for entry in self._daemon.get("/models")["data"] for each in entry["offloadd"]["instances"]]
        return set(states) <= {"ready"}


class _Entered:
    """A context that was entered already: what is left is to leave it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        context.__enter__()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


# Learned footprints


def test_what_a_model_really_takes_is_remembered(nvml: FakeNvml, tmp_path: Path) -> None:
    layered_gguf(tmp_path / "layers.gguf", 20, 300)
    off = {"a": gpu_model(1, source="layers.gguf", vram="auto", run="never")}
    with running_on(nvml, tmp_path, off) as daemon:
        estimated = daemon.look()["vram"]["estimated"]
        assert estimated > 6000 * MIB
        takes = estimated * 1.2 // MIB * MIB
        on = {"a": gpu_model(1, takes=takes / GIB, source="layers.gguf", vram="auto")}
        daemon.apply(on)
        served(daemon, "a")
        assert places(daemon, "a")[nvml.gpus[0].uuid] == estimated
        (problem,) = until(lambda: daemon.get("/health")["problems"], "the drift is reported")
        assert problem["what"].startswith(f"a-1 takes 7.8 GiB on {nvml.gpus[0].uuid}, promised were 6.5 GiB")
        assert daemon.get("/health")["status"] == "degraded"
        found = until(lambda: (vram := daemon.look()["vram"])["learned"] and vram, "it is learned")
        assert found["learned"] == takes != found["estimated"]
        assert found["basis"] == "measured on an earlier launch: 7.8 GiB (estimated 6.5 GiB)"
        assert daemon.pid() == daemon.pids()[0]
        daemon.apply({"a": {**on["a"], "run": "never"}})
        daemon.wait_for("a", "off")
        until(lambda: daemon.get("/health")["problems"] == [], "nothing takes too much any more")
        daemon.apply(on)
        served(daemon, "a")
        assert daemon.launches() == 2
        assert places(daemon, "a")[nvml.gpus[0].uuid] == takes
        until(lambda: daemon.look()["vram"]["measured"], "it is measured")
        assert daemon.get("/health")["problems"] == []
    with restart_on(nvml, daemon) as later:
        assert later.look()["vram"]["learned"] == takes
        served(later, "a")
        assert places(later, "a")[nvml.gpus[0].uuid] == takes


def test_a_model_that_crashed_starts_again_beside_nothing(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(20, devices=[0], run="always")}
    with running_on(nvml, tmp_path, models) as daemon, Watch(daemon, nvml) as watch:
        pid = daemon.pid()
        wait_card(daemon, 0, used_bytes=20 * GIB + nvml.gpus[0].reserved)
        os.kill(pid, 9)
        until(lambda: not alive(pid), "it is dead")
        until(lambda: (found := daemon.pids()) and found != [pid], "another is started")
        assert "--n-gpu-layers" in argv(daemon.pid())
    assert not watch.wrong
