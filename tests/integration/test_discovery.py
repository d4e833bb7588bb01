"""Models on disk, seen, served and gone while the daemon runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import tiny_gguf, until
from tests.integration.daemon import Daemon, again, launch, model, running, wait_healthy
from tests.integration.engines import hub_folder, script

DEFAULTS: Mapping[str, Any] = {"parallel": 2, "context": 4096, "vram": "64MiB", "env": {"STANDIN_TOKEN_S": "0.01"}}
SERVE: Mapping[str, Any] = {"discovery": {"serve": True, "stores": [], "defaults": DEFAULTS}}
FOUND: Mapping[str, Any] = {"discovery": {"stores": []}}
SOON_S = 2.0
"""What is promised."""
PATIENT_S = 20.0
"""What a busy machine is given where nothing is promised."""


def drop(folder: Path, name: str, data: bytes | None = None) -> Path:
    """As a finished download lands: written elsewhere, and moved there in one step."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f"{folder.name}-{path.name}.landing"
    beside.write_bytes(tiny_gguf() if data is None else data)
    os.utime(beside, (time.time() - 3600, time.time() - 3600))
    beside.rename(path)
    return path


def listed(daemon: Daemon) -> dict[str, Any]:
    return {entry["id"]: entry["offloadd"] for entry in daemon.get("/models")["data"]}


def gone(daemon: Daemon, name: str) -> bool:
    return name not in listed(daemon)


def test_a_dropped_file_is_served_by_name_and_a_deleted_one_is_not(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(run="on-demand")}, **SERVE) as daemon:
        assert daemon.names() == ["a"]  # its own file is no second model
        landed = drop(tmp_path, "Tiny-Llama-Q4_K_M.gguf")
        began = time.monotonic()
        until(lambda: "tiny-llama-q4_k_m" in daemon.names(), "it is listed", PATIENT_S)
        took = time.monotonic() - began
        assert daemon.chat("tiny-llama-q4_k_m").status == 200
        assert daemon.chat("Tiny-Llama-Q4_K_M").status == 200
        print(f"servable after {took:.2f} s")
        own = listed(daemon)["tiny-llama-q4_k_m"]
        assert (own["origin"], own["state"], own["served"], own["source"]) == ("discovered", "ready", True, str(landed))
        assert (own["store"], own["fits"], own["context"]) == ("models_path", "now", 4096)
        with daemon.stream("tiny-llama-q4_k_m", tokens=400) as stream:
            stream.skip(3)
            landed.unlink()
            until(lambda: "tiny-llama-q4_k_m" not in daemon.names(), "it is not offered any more", PATIENT_S)
            assert daemon.chat("tiny-llama-q4_k_m").status == 404
            until(lambda: daemon.state("tiny-llama-q4_k_m") == "draining", "its instance is told apart", PATIENT_S)
            told = daemon.look("tiny-llama-q4_k_m")
            assert (told["gone"], told["served"]) == (True, False)
            assert "its file is gone" in told["reason"]
            assert list(stream)[-1] == "[DONE]"  # whoever was served is served to the end
        until(lambda: gone(daemon, "tiny-llama-q4_k_m"), "its instance has ended", PATIENT_S)
        assert daemon.chat("a").status == 200
        assert took < 3 * SOON_S  # the promise is SOON_S; the rest is the machine's noise


def test_what_is_found_is_only_shown_until_it_is_to_be_served(tmp_path: Path) -> None:
    drop(tmp_path, "found.gguf")
    with running(tmp_path, {"a": model(run="on-demand")}, **FOUND) as daemon:
        until(lambda: "found" in listed(daemon), "it is listed", PATIENT_S)
        own = listed(daemon)["found"]
        assert (own["origin"], own["served"], own["state"], own["fits"]) == ("discovered", False, "off", "now")
        assert own["backends"][0]["fits"] == "now"
        assert "not served" in own["reason"]
        assert "discovery.serve" in own["hint"]
        assert daemon.names() == ["a"]
        assert daemon.chat("found").status == 404
        assert daemon.get("/models/found")["offloadd"]["history"] == {"loads": [], "exits": [], "days": []}
        daemon.apply({"a": model(run="on-demand")}, **SERVE)
        assert daemon.chat("found").status == 200
        daemon.apply({"a": model(run="on-demand")}, **FOUND)
        assert daemon.chat("found").status == 404
        daemon.apply({"a": model(run="on-demand")}, discovery={"enabled": False})
        until(lambda: list(listed(daemon)) == ["a"], "nothing that was found is shown or runs", PATIENT_S)


def test_the_config_goes_before_what_is_found(tmp_path: Path) -> None:
    for name in ("found.gguf", "taken.gguf", "other.gguf"):
        drop(tmp_path, name)
    models = {
        "mine": model(run="on-demand", source="found.gguf", context=1024),
        "taken": model(run="on-demand", aliases=["other"]),
    }
    with running(tmp_path, models, **SERVE) as daemon:
        until(lambda: "other" in listed(daemon), "all are listed", PATIENT_S)
        assert daemon.names() == ["mine", "taken"]
        shown = listed(daemon)
        assert set(shown) == {"mine", "taken", "other"}
        assert (shown["taken"]["origin"], shown["taken"]["source"]) == ("configured", "model.gguf")
        assert "another model of this name" in shown["other"]["reason"]
        assert daemon.chat("other").json()["model"] == "taken"


def test_what_cannot_be_used_is_shown_as_what_it_is(tmp_path: Path) -> None:
    whole = tiny_gguf()
    drop(tmp_path, "cut.gguf", whole[:-100])
    drop(tmp_path, "part-00001-of-00002.gguf", whole)
    drop(tmp_path, "text.gguf", b"not a model, whatever its name says")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    (tmp_path / "away.gguf").symlink_to("/nowhere/at-all.gguf")
    with running(tmp_path, {"a": model(run="on-demand")}, **SERVE) as daemon:
        until(lambda: len(listed(daemon)) == 6, "all are listed", PATIENT_S)
        assert daemon.names() == ["a"]
        reasons = {name: own["reason"] for name, own in listed(daemon).items()}
        assert "is truncated" in reasons["cut"]
        assert "part 2 of 2 is missing" in reasons["part"]
        assert "not a GGUF file" in reasons["text"]
        assert "symbolic links" in reasons["loop"]
        assert "is a link to a file that is not there" in reasons["away"]
        assert daemon.get("/health")["status"] == "ok"  # other people's files are nobody's problem
        growing = tmp_path / "growing.gguf"
        with growing.open("wb") as file:
            file.write(whole[:2000])
            file.flush()
            until(lambda: "still being written" in listed(daemon).get("growing", {}).get("reason", ""), "it is seen", PATIENT_S)
            assert daemon.chat("growing").status == 404
            file.write(whole[2000:])
        until(lambda: daemon.chat("growing").status == 200, "it is served once it is whole", PATIENT_S)


def test_a_renamed_file_is_another_name_and_a_folder_that_goes_away_is_not_forgotten(tmp_path: Path) -> None:
    models = tmp_path / "models"
    drop(models, "one.gguf")
    storage = {"data_dir": str(tmp_path / "data"), "models_path": [str(tmp_path), str(models)]}
    with running(tmp_path, {"a": model(run="on-demand")}, storage=storage, **SERVE) as daemon:
        until(lambda: "one" in daemon.names(), "it is served", PATIENT_S)
        before = listed(daemon)["one"]
        (models / "one.gguf").rename(models / "two.gguf")
        until(lambda: daemon.names() == ["a", "two"], "it has its new name", PATIENT_S)
        assert listed(daemon)["two"]["size_bytes"] == before["size_bytes"]


def test_the_registry_remembers_loads_ends_and_requests(tmp_path: Path) -> None:
    slow = {"STANDIN_TOKEN_S": "0.02"}
    with running(tmp_path, {"a": model(run="on-demand", env=slow)}, **FOUND) as daemon:
        assert [daemon.chat("a", tokens=5).status for _ in range(3)] == [200] * 3
        with daemon.stream("a", tokens=400) as stream:
            stream.skip(2)
        until(lambda: daemon.load() == 0, "the one who left is gone", PATIENT_S)
        shown = daemon.look()
        assert shown["usage"]["requests"] >= 4
        history = shown["history"]
        assert len(history["loads"]) == 1
        assert history["loads"][0]["seconds"] > 0
        assert history["loads"][0]["size_bytes"] == len(tiny_gguf())
        (day,) = history["days"]
        assert day["answered"] == 3
        assert day["cancelled"] == 1
        assert day["completion_tokens"] >= 15
        os.kill(daemon.pid(), 9)
        until(lambda: daemon.look()["history"]["exits"], "its end is remembered", PATIENT_S)
        assert daemon.look()["history"]["exits"][0]["kind"] == "killed"
        folder, path, base = daemon.folder, daemon.config_path, daemon.base
    later = again(folder, path, base)
    try:
        wait_healthy(later)
        assert later.look()["history"]["days"] == [{**day, "seconds": later.look()["history"]["days"][0]["seconds"]}]
        assert later.look()["usage"]["answered"] == 3
        later.close()
    finally:
        later.discard()


@pytest.mark.skipif(shutil.which("cp") is None, reason="there is no cp")
def test_a_copy_in_progress_is_not_served_before_it_is_whole(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(run="on-demand")}, **SERVE) as daemon:
        target, whole = tmp_path / "copied.gguf", tiny_gguf()
        with target.open("wb") as file:
            for start in range(0, len(whole), 1000):
                file.write(whole[start : start + 1000])
                file.flush()
                assert daemon.chat("copied").status == 404 or start + 1000 >= len(whole)
        until(lambda: daemon.chat("copied").status == 200, "it is served", PATIENT_S)


def test_a_found_models_server_outlives_the_daemon(tmp_path: Path) -> None:
    drop(tmp_path, "found.gguf")
    first = launch(tmp_path, {"a": model(run="on-demand")}, **SERVE)
    second = None
    try:
        wait_healthy(first)
        until(lambda: first.chat("found").status == 200, "it is served", PATIENT_S)
        until(lambda: first.get("/models/found")["offloadd"]["history"]["loads"], "the registry has it all", PATIENT_S)
        pid = first.pid("found")
        first.process.kill()
        first.process.wait()
        second = wait_healthy(again(first.folder, first.config_path, first.base))
        until(lambda: second.chat("found").status == 200, "it is served by the next daemon", PATIENT_S)
        assert second.pid("found") == pid  # the same process, with its model loaded
        second.close()
    finally:
        (second or first).discard()


def test_an_adapter_in_the_hubs_layout_is_served_over_its_base_by_vllm(tmp_path: Path) -> None:
    base = hub_folder(tmp_path)
    pirate = tmp_path / "loras" / "pirate"
    pirate.mkdir(parents=True)
    said = {"peft_type": "LORA", "base_model_name_or_path": "somebody/hub-model", "r": 40}
    (pirate / "adapter_config.json").write_text(json.dumps(said))
    shutil.copyfile(base / "model.safetensors", pirate / "adapter_model.safetensors")
    discovery = {"serve": True, "stores": [], "defaults": {"vram": "64MiB"}}
    with running(tmp_path, {}, backends={"vllm": {"command": [*script("vllm_server"), "serve"]}}, discovery=discovery) as daemon:
        until(lambda: {"hub-model", "pirate"} <= set(daemon.names()), "both are offered", PATIENT_S)
        reply = daemon.chat("pirate")
        assert (reply.status, reply.json()["model"]) == (200, "pirate")
        entries = {entry["id"]: entry for entry in daemon.get("/upstream/pirate/v1/models")["data"]}
        assert (entries["pirate"]["root"], entries["pirate"]["parent"]) == (str(pirate), "pirate:base")
        assert entries["pirate:base"]["root"] == str(base)
        assert listed(daemon)["pirate"]["state"] == "ready"
        assert listed(daemon)["hub-model"]["state"] == "off"  # which is a model of its own
        assert daemon.chat("hub-model").status == 200
        shutil.rmtree(pirate)
        until(lambda: "pirate" not in daemon.names(), "the adapter is not offered any more", PATIENT_S)
        assert daemon.chat("hub-model").status == 200
