"""The real vLLM on the CPU, held to the suite that every engine passes, and served by a real daemon. `make engines` runs this."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from offloadd import demo
from offloadd.backends.vllm import BACKEND, VllmOptions
from offloadd.errors import PermanentError
from offloadd.registry.readers import read_model
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import ModelFacts
from offloadd.units import Bytes
from tests.conformance.engine_suite import Behind, EngineConformance
from tests.conformance.processes import until
from tests.integration.daemon import Daemon, alive, running
from tests.integration.engines import elsewhere, script, served_by

pytestmark = pytest.mark.timeout(900)
READY_S = 240.0
ENV = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def vllm() -> Path:
    """Where it was installed."""
    found = os.environ.get("OFFLOADD_VLLM", "")
    if not Path(found, "bin", "vllm").exists():
        pytest.skip("no vLLM: make engines installs it and sets OFFLOADD_VLLM")
    return Path(found)


class TestVllm(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, vllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        tiny = vllm / "tiny"
        engine = Engine(name=BackendName("vllm"), adapter="vllm", command=(str(vllm / "bin" / "vllm"), "serve"))
        options = {"vllm": VllmOptions(eager=True)}
        spec = ModelSpec(
            name=ModelName("tiny"), source=str(tiny), backends=(engine.name,), context=256, parallel=2, options=options
        )
        facts = ModelFacts(path=str(tiny), size=Bytes(1), shape=read_model(tiny))
        return Behind(BACKEND, engine, spec, facts, tmp_path_factory.mktemp("vllm"), env=ENV, ready_within_s=READY_S)


def real_vllm(vllm: Path, **changes: Any) -> dict[str, Any]:
    """A model on it."""
    usual = {"source": str(vllm / "tiny"), "backends": ["vllm"], "run": "always", "context": 256, "parallel": 2}
    return {**usual, "env": ENV, "vllm": {"eager": True}, "start_timeout": "10m", **changes}


def engine_of(vllm: Path) -> dict[str, Any]:
    return {"command": [str(vllm / "bin" / "vllm"), "serve"]}


@pytest.fixture(scope="module")
def daemon(vllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One config: real llama-server and vLLM, a stand-in for TGI, a program of one's own, and a server that runs elsewhere."""
    folder = tmp_path_factory.mktemp("real")
    try:
        command, env = demo.find_server()
        gguf = str(demo.find_model())
    except PermanentError as missing:
        pytest.skip(missing.message)
    own = [*script("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}"]
    with elsewhere(folder) as away:
        backends = {
            "llamacpp": {"command": [str(command)], "env": env},
            "vllm": engine_of(vllm),
            "tgi": {"command": script("tgi_launcher")},
            "own": {"kind": "custom", "command": own},
            "cloud": away.entry,
        }
        models = {
            "on-llamacpp": served_by("llamacpp", sources={"llamacpp": gguf}, vram="300MiB", env={}, run="always"),
            "on-vllm": real_vllm(vllm),
            "on-tgi": served_by("tgi"),
            "on-own": served_by("own"),
            "on-cloud": served_by("cloud"),
        }
        budget = {"host": {"limit": "95%"}}
        with running(folder, models, backends=backends, budget=budget) as found:
            found.wait_for("on-vllm", within_s=READY_S)
            yield found


@pytest.mark.parametrize("name", ["llamacpp", "vllm", "tgi", "own", "cloud"])
def test_all_of_one_config_answer_through_the_port(daemon: Daemon, name: str) -> None:
    reply = daemon.chat(f"on-{name}")
    assert reply.status == 200, reply.body
    assert reply.headers["X-Offloadd-Backend"] == name
    assert reply.json()["usage"]["completion_tokens"] == 4
    events = daemon.events(f"on-{name}", tokens=4)
    assert events[-1] == "[DONE]"
    assert sum(bool(event["choices"]) for event in events[:-1]) >= 4


def parts(pid: int) -> dict[str, psutil.Process]:
    """Its processes by name."""
    leader = psutil.Process(pid)
    return {"leader": leader, **{each.name(): each for each in leader.children(recursive=True)}}


def test_its_api_server_is_killed_and_nothing_of_it_is_left(daemon: Daemon) -> None:
    old = parts(daemon.pid("on-vllm"))
    assert {"VLLM::EngineCore", "VLLM::Worker"} <= set(old), sorted(old)
    began = time.monotonic()
    old["leader"].kill()
    until(lambda: not any(alive(each.pid) for each in old.values()), "all of it is gone", 30)
    took = time.monotonic() - began
    assert took < 30  # stop_timeout
    print(f"gone {took:.2f} s after kill -9: {sorted(old)}")
    until(lambda: daemon.pids("on-vllm") not in ([], [old["leader"].pid]), "another is started", 60)
    daemon.wait_for("on-vllm", within_s=READY_S)
    print(f"the replacement serves {time.monotonic() - began:.1f} s after kill -9")
    assert daemon.chat("on-vllm").status == 200


def test_its_engine_is_killed_and_it_is_replaced(daemon: Daemon) -> None:
    old = parts(daemon.pid("on-vllm"))
    old["VLLM::EngineCore"].kill()
    until(lambda: not any(alive(each.pid) for each in old.values()), "all of it is gone", 60)
    assert "its engine process died" in until(lambda: daemon.log if "its engine" in daemon.log else "", "the log says why")
    daemon.wait_for("on-vllm", within_s=READY_S)
    assert daemon.chat("on-vllm").status == 200
