"""vLLM and TGI on the fake NVML: stand-ins that follow the real ones' rules of memory take what they were promised, and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conformance.processes import until
from tests.fakes.nvml import fake
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, running
from tests.integration.engines import engines, hub_folder, served_by
from tests.integration.gpu import GIB, MIB, cards, environ, environment, held, option, places, process_holding


@contextlib.contextmanager
def on_cards(nvml: FakeNvml, folder: Path, models: dict[str, Any], **more: Any) -> Iterator[Daemon]:
    """A daemon that sees the cards, with engines that ask the same library how full they are."""
    hub_folder(folder)
    library = str(fake.build().parent)
    shown = {**nvml.environment, "LD_LIBRARY_PATH": library, "FAKE_NVML_PROCS": str(nvml.procs)}
    backends = {name: {**engine, "env": {**engine.get("env", {}), **shown}} for name, engine in engines().items()}
    more.setdefault("patches", {"offloadd.rounds.REFRESH": 0.2})
    with running(folder, models, backends=backends, env=environment(nvml), **more) as daemon:
        yield daemon


def on(name: str, gib: float, weights_mib: int = 600, **changes: Any) -> dict[str, Any]:
    """A model of this engine, promised so much, whose weights are smaller: the rest it fills as its engine does."""
    env = {"STANDIN_GPU_WEIGHTS_MIB": weights_mib, "STANDIN_LOAD_S": 0.3, **changes.pop("env", {})}
    return served_by(name, **{"vram": f"{int(gib * 1024)}MiB", "run": "always", "env": env, **changes})


def test_each_takes_its_promise_and_two_of_them_share_a_card(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    models = {"v": on("vllm", 8), "t": on("tgi", 7)}
    with on_cards(nvml, tmp_path, models) as daemon:
        for name in models:
            daemon.wait_for(name, within_s=40)
        promised = sum(sum(places(daemon, name).values()) for name in models)
        (used,) = held(nvml)
        assert used <= promised - 4 * GIB  # of which 2 GiB each are in RAM
        assert used > promised - 4 * GIB - 2 * GIB  # and they do fill it
        # One after another, since each measures the card: the second counts what the first holds.
        first, second = sorted(models, key=lambda name: daemon.look(name)["instances"][0]["started_at"])
        assert "waits until" in daemon.log
        assert environ(daemon.pid(first))["CUDA_VISIBLE_DEVICES"] == nvml.gpus[0].uuid
        assert daemon.chat(second).status == 200


def test_what_a_stranger_holds_does_not_make_tgi_take_less_or_more(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with process_holding(nvml, 0, 10), on_cards(nvml, tmp_path, {"t": on("tgi", 6)}) as daemon:
        daemon.wait_for("t", within_s=40)
        (used,) = held(nvml)
        own = used - 10 * GIB
        assert 5 * GIB < own <= 6 * GIB


def test_over_two_cards_each_takes_its_part(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 2)
    with on_cards(nvml, tmp_path, {"v": on("vllm", 12, devices=[0, 1])}) as daemon:
        daemon.wait_for("v", within_s=40)
        pid = daemon.pid("v")
        assert option(pid, "--tensor-parallel-size") == "2"
        assert all(5 * GIB < used <= 6 * GIB for used in held(nvml))
        assert float(option(pid, "--gpu-memory-utilization")) < 0.25


def test_too_small_a_promise_is_a_permanent_failure_that_says_what_to_do(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with on_cards(nvml, tmp_path, {"v": on("vllm", 2, weights_mib=4000)}) as daemon:
        found = daemon.wait_for("v", "failed", within_s=40)
        assert "leave no memory for the KV cache" in found["reason"]
        until(lambda: held(nvml) == [0], "its memory is back")


def test_an_exact_cache_is_taken_beside_the_weights(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    with on_cards(nvml, tmp_path, {"v": on("vllm", 6, vllm={"kv_cache": "1GiB"})}) as daemon:
        daemon.wait_for("v", within_s=40)
        (used,) = held(nvml)
        assert used == (400 + 600 + 512 + 1024) * MIB
