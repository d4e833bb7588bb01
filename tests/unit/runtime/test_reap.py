"""Ending what a daemon has left: whose it is, and when it is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.registry.lives import LifeBook
from offloadd.runtime.lock import leave_kept, locked
from offloadd.runtime.reap import reap as reap_with

OFFLOADD = [sys.executable, "-m", "offloadd", "reap"]


def reap(home: Path, *, kept: bool) -> str:
    return reap_with(home, kept=kept, book=LifeBook)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that a daemon with this data folder has left."""
    with subprocess.Popen(["sleep", "600"], env={**os.environ, "OFFLOADD_DATA_DIR": str(tmp_path)}) as process:
        yield process
        process.kill()


def test_what_is_left_is_ended_and_nothing_of_another_folder(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert reap(tmp_path / "other", kept=True).endswith("nothing is left running")
    assert server.poll() is None
    assert reap(tmp_path, kept=False) == f"{tmp_path}: 1 process ended"
    assert server.wait(10) == -9


def test_a_living_daemons_are_left_alone(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with locked(tmp_path):
        assert f"another offloadd (pid {os.getpid()}) uses" in reap(tmp_path, kept=True)
    assert server.poll() is None


def test_what_was_kept_on_purpose_is_left_alone_unless_asked_for(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with locked(tmp_path):
        leave_kept(tmp_path)
    assert "left them on purpose" in reap(tmp_path, kept=False)
    assert server.poll() is None
    assert reap(tmp_path, kept=True).endswith("1 process ended")
    with locked(tmp_path):
        pass  # another daemon came since: what it leaves is not kept on purpose
    assert "nothing" in reap(tmp_path, kept=False)


@pytest.mark.parametrize(("result", "acts"), [("success", True), ("signal", False), ("watchdog", False)])
def test_after_a_crash_it_leaves_all_to_the_next_daemon(
    server: subprocess.Popen[bytes], tmp_path: Path, result: str, acts: bool
) -> None:
    env = {**os.environ, "STATE_DIRECTORY": str(tmp_path), "SERVICE_RESULT": result}
    subprocess.run(OFFLOADD, env=env, check=True, timeout=60)
    assert (server.poll() is not None) == acts
