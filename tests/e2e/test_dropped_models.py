"""A real model file that comes while the daemon runs, however it is copied, and goes while it is served."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.e2e.conftest import Real
from tests.integration.daemon import Daemon, alive, running

NAME = "smollm2-135m-instruct.q4_1"
"""What discovery makes of the file's name."""
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOON_S = 2.0
"""What is promised."""
PATIENT_S = 30.0
LANDINGS = 3
CHUNK = 4 * 2**20


@pytest.fixture
def daemon(real: Real, tmp_path: Path) -> Iterator[Daemon]:
    defaults = {"context": 1024, "parallel": 2, "llamacpp": {"threads": 1, "cache_ram": 0}}
    discovery = {"serve": True, "stores": [], "defaults": defaults}
    with running(tmp_path, {}, llamacpp=real.llamacpp, discovery=discovery) as daemon:
        yield daemon


def offered(daemon: Daemon) -> dict[str, Any] | None:
    """Its entry of the list once it is served, fits, and is known well enough to be started."""
    entries = {entry["id"]: entry["offloadd"] for entry in daemon.get("/models")["data"]}
    own = entries.get(NAME)
    is_startable = own and own["served"] and own["fits"] == "now" and NAME in daemon.names()
    return own if is_startable else None


def seconds_until_offered(daemon: Daemon) -> float:
    landed = time.monotonic()
    until(lambda: offered(daemon), "it is offered", PATIENT_S)
    return time.monotonic() - landed


def remove(daemon: Daemon, path: Path) -> None:
    path.unlink()
    until(lambda: NAME not in daemon.names() and daemon.request("GET", f"/models/{NAME}").status == 404, "it is gone", PATIENT_S)


def test_a_model_that_is_moved_in_is_served_within_two_seconds(real: Real, daemon: Daemon, tmp_path: Path) -> None:
    beside, target, took = tmp_path / "landing", tmp_path / FILE, []
    for _ in range(LANDINGS):
        shutil.copyfile(real.gguf, beside)  # written this moment, as by any download
        beside.rename(target)
        took.append(seconds_until_offered(daemon))
        own = offered(daemon)
        assert own is not None
        assert (own["origin"], own["source"], own["architecture"]) == ("discovered", str(target), "llama")
        remove(daemon, target)
    shutil.copyfile(real.gguf, target)
    asked = time.monotonic()
    until(lambda: offered(daemon), "it is offered", PATIENT_S)
    reply = daemon.chat(NAME, 4)
    assert reply.status == 200
    assert reply.json()["model"] == NAME
    answered = time.monotonic() - asked
    print(f"servable after {', '.join(f'{each:.2f}' for each in took)} s; the first answer {answered:.2f} s after a copy")
    assert statistics.median(took) < SOON_S, took


def test_a_slow_copy_is_served_when_it_is_whole_and_not_before(real: Real, daemon: Daemon, tmp_path: Path) -> None:
    with real.gguf.open("rb") as source, (tmp_path / FILE).open("wb") as target:
        while chunk := source.read(CHUNK):
            assert NAME not in daemon.names()
            assert daemon.chat(NAME).status == 404
            target.write(chunk)
            target.flush()
    took = seconds_until_offered(daemon)
    assert daemon.chat(NAME, 4).status == 200
    print(f"servable {took:.2f} s after the end of the copy")
    assert took < SOON_S


def test_a_deleted_one_is_gone_and_its_running_server_is_told_apart(real: Real, daemon: Daemon, tmp_path: Path) -> None:
    target = tmp_path / FILE
    shutil.copyfile(real.gguf, target)
    until(lambda: offered(daemon), "it is offered", PATIENT_S)
    with daemon.stream(NAME, 120, ignore_eos=True) as stream:
        stream.skip(3)
        pid = daemon.pid(NAME)
        target.unlink()
        until(lambda: NAME not in daemon.names(), "it is not offered any more", PATIENT_S)
        assert daemon.chat(NAME).status == 404
        told = until(lambda: (own := daemon.look(NAME))["state"] == "draining" and own, "its server is told apart", PATIENT_S)
        assert (told["gone"], told["served"]) == (True, False)
        assert "its file is gone" in told["reason"]
        assert [each["pid"] for each in told["instances"]] == [pid]
        assert list(stream)[-1] == "[DONE]"  # whoever was served is served to the end
    until(lambda: not alive(pid), "its server has ended", PATIENT_S)
    until(lambda: daemon.request("GET", f"/models/{NAME}").status == 404, "nothing is left of it", PATIENT_S)
    shutil.copyfile(real.gguf, target)
    until(lambda: offered(daemon), "it is back under its name", PATIENT_S)
