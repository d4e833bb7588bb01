"""A model from the hub, by the command and over HTTP, served as soon as it has landed."""

from __future__ import annotations

import subprocess
import sys
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
