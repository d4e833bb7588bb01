"""`POST /plan` and `offloadd plan`: what a config would change is told, and nothing is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.daemon import Daemon, model, running

MODELS: dict[str, Any] = {"steady": model(), "edited": model(), "idle": model(run="on-demand")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("plan"), MODELS, budget={"host": {"limit": "200MiB"}}) as daemon:
        for name in ("steady", "edited"):
            daemon.wait_for(name)
        yield daemon


def config(daemon: Daemon, **models: Any) -> str:
    return json.dumps({**daemon.base, "models": {**MODELS, **models}})


def plan(daemon: Daemon, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = daemon.folder / "next.json"
    path.write_text(text)
    command = [sys.executable, "-m", "offloadd", "plan", str(path), "--server", f"http://127.0.0.1:{daemon.port}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_same_config_changes_nothing(shared: Daemon) -> None:
    same = plan(shared, config(shared))
    assert (same.returncode, same.stdout) == (0, "nothing would change\n")


def test_what_is_added_replaced_removed_and_left_waiting_is_told_with_the_ledger(shared: Daemon) -> None:
    before = shared.get("/models")
    text = config(shared, edited=model(context=4096), idle=model(run="on-demand", priority=40), late=model(vram="150MiB"))
    found = plan(shared, text, "--json")
    assert found.returncode == 4
    answer = json.loads(found.stdout)
    models = {each["model"]: each for each in answer["models"]}
    assert {name: each["effect"] for name, each in models.items()} == {"edited": "replace", "idle": "in place", "late": "none"}
    assert (models["edited"]["fields"], models["idle"]["fields"]) == (["context"], ["priority"])
    assert [each["instance"] for each in models["edited"]["starts"]] == ["edited-2"]
    assert models["edited"]["ends"] == [{"instance": "edited-1", "why": "its config changed"}]
    assert models["late"]["after"]["state"] == "waiting"
    (ram,) = [device for device in answer["devices"] if device["label"] == "host"]
    assert ram["before"]["reserved_bytes"] == ram["after"]["reserved_bytes"] == 128 * 2**20
    shown = plan(shared, text)
    assert "edited: replace (changed: context)" in shown.stdout
    assert "    starts edited-2 on llamacpp with 64.0 MiB on host" in shown.stdout
    after = shared.get("/models")
    same = [[(e["id"], [i["pid"] for i in e["offloadd"]["instances"]]) for e in look["data"]] for look in (before, after)]
    assert same[0] == same[1]


def test_a_bad_config_is_refused_with_its_places(shared: Daemon) -> None:
    reply = shared.request("POST", "/plan", b"models: {a: {sauce: x}}")
    assert (reply.status, reply.json()["ok"]) == (400, False)
    assert reply.json()["diagnostics"]
    found = plan(shared, '{"models": {"a": {"sauce": "x"}}}')
    assert found.returncode == 1
    assert "sauce" in found.stderr


def test_what_would_be_evicted_is_told(shared: Daemon) -> None:
    answer = shared.request("POST", "/plan", config(shared, first=model(vram="190MiB", priority=90)).encode()).json()
    effects = {each["model"]: each["effect"] for each in answer["models"]}
    assert effects == {"first": "start", "steady": "evict", "edited": "evict"}
