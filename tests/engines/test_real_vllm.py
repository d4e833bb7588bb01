"""The real vLLM on the CPU, held to the suite that every engine passes, and served by a real daemon. `make engines` runs this."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from offloadd import demo
from offloadd.backends.vllm import BACKEND
from offloadd.backends.vllm_options import VllmOptions
from offloadd.errors import PermanentError
from offloadd.registry.readers import read_model
from offloadd.runtime.launchers.shared import mapped, still_there
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import ModelFacts
from offloadd.units import Bytes
from tests.conformance.engine_suite import Behind, EngineConformance
from tests.conformance.processes import until
from tests.integration.daemon import Daemon, alive, running
from tests.integration.engines import Elsewhere, elsewhere, hub_folder, script, served_by

pytestmark = pytest.mark.timeout(1500)
READY_S = 600.0
"""A minute on a machine of its own; imports alone took six times that on one with a load of twelve."""
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
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """The server that runs elsewhere."""
    with elsewhere(tmp_path_factory.mktemp("away")) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(vllm: Path, away: Elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One config: real llama-server and vLLM, a stand-in for TGI, a program of one's own, and a server that runs elsewhere."""
    folder = tmp_path_factory.mktemp("real")
    hub_folder(folder)
    try:
        command, env = demo.find_server()
        gguf = str(demo.find_model())
    except PermanentError as missing:
        pytest.skip(missing.message)
    own = [*script("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}"]
    backends = {
        "llamacpp": {"command": [str(command)], "env": env},
        "vllm": engine_of(vllm),
        "tgi": {"command": script("tgi_launcher")},
        "own": {"kind": "custom", "command": own},
        "cloud": away.entry,
    }
    real = {"vram": "300MiB", "env": {}}
    models = {
        "on-llamacpp": served_by("llamacpp", sources={"llamacpp": gguf}, run="always", **real),
        "on-vllm": real_vllm(vllm),
        "on-tgi": served_by("tgi"),
        "on-own": served_by("own"),
        "on-cloud": served_by("cloud"),
        "many": served_by("llamacpp", "tgi", "own", "cloud", sources={**SOURCES, "llamacpp": gguf}, **real),
        "far-first": served_by("cloud", "own"),
    }
    with running(folder, models, backends=backends, budget={"host": {"limit": "95%"}}) as found:
        found.wait_for("on-vllm", within_s=READY_S)
        yield found


SOURCES = {"own": "model.gguf", "cloud": Elsewhere.name}
ENGINES = ("llamacpp", "vllm", "tgi", "own", "cloud")


@pytest.mark.parametrize("name", ENGINES)
def test_all_of_one_config_answer_through_the_port(daemon: Daemon, name: str) -> None:
    reply = daemon.chat(f"on-{name}", temperature=0)  # a real model that is let choose may end sooner
    assert reply.status == 200, reply.body
    assert reply.headers["X-Offloadd-Backend"] == name
    assert reply.headers["X-Offloadd-Reason"]
    assert reply.json()["usage"]["completion_tokens"] == 4
    events = daemon.events(f"on-{name}", tokens=4, temperature=0)
    assert events[-1] == "[DONE]"
    assert sum(bool(event["choices"]) for event in events[:-1]) >= 4


@pytest.mark.parametrize("name", [None, "tgi", "own", "cloud", "llamacpp"])
def test_a_model_of_many_engines_goes_to_the_first_or_to_the_one_that_is_named(daemon: Daemon, name: str | None) -> None:
    named = {} if name is None else {"backend": name}
    reply = daemon.chat("many", **named)
    assert reply.status == 200, reply.body
    assert reply.headers["X-Offloadd-Backend"] == (name or "llamacpp")
    assert reply.headers["X-Offloadd-Reason"]
    assert daemon.events("many", tokens=4, **named)[-1] == "[DONE]"


@pytest.mark.parametrize("name", ["llamacpp", "tgi", "own"])
def test_each_that_is_killed_is_replaced_with_nothing_left_of_it(daemon: Daemon, name: str) -> None:
    assert daemon.chat(f"on-{name}").status == 200
    old = parts(daemon.pid(f"on-{name}"))
    old["leader"].kill()
    until(lambda: not any(alive(each.pid) for each in old.values()), "all of it is gone", 30)
    reply = until(lambda: found if (found := daemon.chat(f"on-{name}")).status == 200 else None, "another serves", 60)
    assert reply.headers["X-Offloadd-Backend"] == name
    assert daemon.pid(f"on-{name}") != old["leader"].pid


def parts(pid: int) -> dict[str, psutil.Process]:
    """Its processes by name; two of one name count once."""
    leader = psutil.Process(pid)
    return {"leader": leader, **{each.name(): each for each in leader.children(recursive=True)}}


def test_its_api_server_is_killed_and_nothing_of_it_is_left(daemon: Daemon) -> None:
    old = parts(daemon.pid("on-vllm"))
    assert {"VLLM::EngineCore", "VLLM::Worker"} <= set(old), sorted(old)
    pieces = mapped(each.pid for each in old.values())
    folder = Path(old["leader"].environ()["TMPDIR"])
    sockets = [path for path in folder.iterdir() if path.is_socket()]
    assert {piece.name.partition("_")[0] for piece in pieces} >= {"psm"}, pieces
    assert sockets, list(folder.iterdir())
    assert old["VLLM::EngineCore"].environ().get("TMPDIR", str(folder)) == str(folder)
    began = time.monotonic()
    old["leader"].kill()
    until(lambda: not any(alive(each.pid) for each in old.values()), "all of it is gone", 30)
    took = time.monotonic() - began
    assert took < 30  # stop_timeout
    print(f"gone {took:.2f} s after kill -9: {sorted(old)}")
    until(lambda: not folder.exists() and not still_there(pieces), "what it has left is gone", 30)
    print(f"taken away: {len(sockets)} sockets, {sorted(piece.name for piece in pieces)}")
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


def test_a_server_elsewhere_that_dies_is_passed_over(daemon: Daemon, away: Elsewhere) -> None:
    """The last of the file: it does not come back."""
    assert daemon.chat("far-first").headers["X-Offloadd-Backend"] == "cloud"
    os.killpg(away.server.process.pid, signal.SIGKILL)
    reply = until(lambda: found if (found := daemon.chat("far-first")).status == 200 else None, "the next serves", 60)
    assert reply.headers["X-Offloadd-Backend"] == "own"
    assert reply.headers["X-Offloadd-Reason"]
