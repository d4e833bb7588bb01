"""A model from the hub, by the command and over HTTP, served as soon as it has landed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

from tests.conformance.servers import HOST, tiny_gguf, until
from tests.fakes import hub as fake
from tests.integration.daemon import Daemon, model, running
from tests.integration.test_discovery import PATIENT_S, SERVE


def offloadctl(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(Path(sys.executable).with_name("offloadctl")), "--server", f"http://{HOST}:{daemon.port}", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=90)


@pytest.fixture
def hub() -> Iterator[fake.Hub]:
    with fake.serving({"org/Tiny-GGUF": {"Tiny-Q4_K_M.gguf": tiny_gguf(), "Tiny-Q8_0.gguf": tiny_gguf()}}) as found:
        yield found


@pytest.fixture
def daemon(tmp_path: Path, hub: fake.Hub) -> Iterator[Daemon]:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    with running(tmp_path, {"a": model(run="on-demand")}, env=env, **SERVE) as found:
        yield found


def test_ollamas_client_pulls(tmp_path: Path, daemon: Daemon) -> None:
    ollama = pytest.importorskip("ollama", reason="pip install .[clients]")
    with ollama.Client(host=f"http://{HOST}:{daemon.port}") as client:
        *lines, last = list(client.pull("hf.co/org/Tiny-GGUF:Q4_K_M", stream=True))
        assert last.status == "success"
        assert (tmp_path / "org" / "Tiny-GGUF" / "Tiny-Q4_K_M.gguf").read_bytes() == tiny_gguf()
        assert any(line.status.startswith("pulling Tiny-Q4_K_M.gguf") and line.total == len(tiny_gguf()) for line in lines)
        assert all((line.completed or 0) <= (line.total or 0) for line in lines)
        assert client.pull("https://huggingface.co/org/Tiny-GGUF:Q8_0").status == "success"
        until(lambda: {"tiny-q4_k_m", "tiny-q8_0"} <= set(daemon.names()), "they are served", PATIENT_S)
        assert client.chat("hf.co/org/Tiny-GGUF:Q4_K_M", [{"role": "user", "content": "hi"}]).message.content
        with pytest.raises(ollama.ResponseError, match="Ollama's own library, which is not used here") as caught:
            client.pull("llama3:latest")
        assert caught.value.status_code == 400
        with pytest.raises(ollama.ResponseError, match="is called Q2_K; it has Tiny-Q4_K_M"):
            client.pull("hf.co/org/Tiny-GGUF:Q2_K")
        with pytest.raises(ollama.ResponseError, match="is called Q2_K; it has Tiny-Q4_K_M"):
            list(client.pull("hf.co/org/Tiny-GGUF:Q2_K", stream=True))
        with pytest.raises(ollama.ResponseError, match="names no repository"):
            client.pull("hf.co/nonsense")
    assert daemon.post("/api/pull", {"name": "llama3"}).json()["error"].startswith('"llama3" is of')
    assert "expected" in daemon.post("/api/pull", b"[").json()["error"]


def test_a_pull_of_ollamas_ends_with_the_last_who_follows_it(hub: fake.Hub, daemon: Daemon) -> None:
    hub.gate = threading.Event()
    asked = {"model": "hf.co/org/Tiny-GGUF:Q4_K_M"}

    def state() -> str:
        return str(daemon.get("/pulls")["pulls"][0]["state"])

    first = daemon.begin("/api/pull", asked)
    until(lambda: daemon.get("/pulls")["pulls"] and state() == "downloading", "it is on its way", 30)
    second = daemon.begin("/api/pull", asked)
    assert b'"status"' in second.getresponse().readline()
    first.close()
    with pytest.raises(AssertionError):
        until(lambda: state() == "cancelled", "it is cancelled though somebody follows it", 1)
    second.close()
    until(lambda: state() == "cancelled", "it is cancelled", 10)
    # One that was begun as a job is not Ollama's to end.
    assert daemon.post("/models/pull", {"source": "org/Tiny-GGUF:Q8_0"}).status == 202
    third = daemon.begin("/api/pull", {"model": "hf.co/org/Tiny-GGUF:Q8_0"})
    third.getresponse().readline()
    third.close()
    hub.gate.set()
    until(lambda: daemon.get("/pulls")["pulls"][1]["state"] == "landed", "it has landed", 30)


def test_a_pulled_model_is_served_by_name(tmp_path: Path) -> None:
    with fake.serving({"org/Tiny-GGUF": {"Tiny-Q4_K_M.gguf": tiny_gguf(), "Tiny-Q8_0.gguf": tiny_gguf()}}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        with running(tmp_path, {"a": model(run="on-demand")}, env=env, **SERVE) as daemon:
            pulled = offloadctl(daemon, "pull", "org/Tiny-GGUF:Q4_K_M")
            assert (pulled.returncode, pulled.stderr) == (0, "")
            landed = tmp_path / "org" / "Tiny-GGUF" / "Tiny-Q4_K_M.gguf"
            assert pulled.stdout.split() == [str(landed)]
            assert landed.read_bytes() == tiny_gguf()
            until(lambda: "tiny-q4_k_m" in daemon.names(), "it is served", PATIENT_S)
            assert daemon.chat("org/Tiny-GGUF:Q4_K_M").status == 200
            shown = offloadctl(daemon, "models")
            assert shown.returncode == 0, shown.stderr
            assert "tiny-q4_k_m" in shown.stdout
            refused = offloadctl(daemon, "pull", "org/Tiny-GGUF:Q2_K")
            assert refused.returncode == 1
            assert "is called Q2_K; it has Tiny-Q4_K_M" in refused.stderr

            reply = daemon.post("/models/pull", {"source": "org/Tiny-GGUF:Q8_0"})
            assert reply.status == 202
            key = reply.json()["id"]
            assert reply.headers["Location"] == f"/pulls/{key}"
            events = daemon.request("GET", f"/pulls/{key}/events").events
            assert events[-1]["state"] == "landed"
            assert daemon.get(f"/pulls/{key}") == events[-1]
            assert len(daemon.get("/pulls")["pulls"]) == 3
            assert daemon.post("/models/pull", {"source": "nonsense"}).status == 400
            assert daemon.post("/models/pull", {"url": "http://elsewhere"}).status == 400
            assert daemon.request("GET", "/pulls/none").status == 404
