"""Servers that signals do not reach, as in a container: their stop_command ends them, also when the daemon that began them is gone.

A container's client is stood in for by a script that starts the server in a session of its own, without our mark, and waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from offloadd.registry.lives import LifeBook
from offloadd.units import Seconds
from tests.conformance.processes import until
from tests.integration.daemon import Daemon, again, alive, launch, supervised, wait_healthy
from tests.integration.engines import engines, hub_folder, script, served_by

_RUN = """\
env -i PATH="$PATH" STANDIN_IGNORE_TERM=1 setsid "$@" &
echo $! > $FOLDER/pid-$TEST_PORT
trap "" TERM
wait
"""
_STOP = """\
echo "$1 $TEST_PORT" >> $FOLDER/stopped
kill -9 $(cat $FOLDER/pid-$1)
"""


@dataclass
class Begun:
    """A daemon that was killed, and what it left: the client's process, and the server that only the command reaches."""

    daemon: Daemon
    client: int
    server: int
    port: str

    @property
    def stopped(self) -> list[str]:
        """Ports for which the command was run, each with the variable that it was given."""
        path = self.daemon.folder / "stopped"
        return path.read_text().splitlines() if path.exists() else []

    def next(self) -> contextlib.AbstractContextManager[Daemon]:
        return supervised(again(self.daemon.folder, self.daemon.config_path, self.daemon.base))


def backends_of(folder: Path, stop: str = "stop-elsewhere") -> dict[str, Any]:
    """An engine behind such a client."""
    found = engines()
    server = [*script("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}"]
    found["own"] |= {
        "command": [str(folder / "run-elsewhere"), *server],
        "stop_command": [str(folder / stop), "${port}"],
        "env": {"TEST_PORT": "${port}"},
    }
    return found


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Begun]:
    for name, text in (("run-elsewhere", _RUN), ("stop-elsewhere", _STOP), ("stop-nothing", "true\n")):
        (tmp_path / name).write_text(f"#!/bin/sh\nFOLDER={tmp_path}\n{text}")
        (tmp_path / name).chmod(0o755)
    hub_folder(tmp_path)
    daemon = launch(tmp_path, {"a": served_by("own", stop_timeout="10s")}, backends=backends_of(tmp_path))
    try:
        wait_healthy(daemon)
        assert daemon.chat().status == 200
        (pid_file,) = tmp_path.glob("pid-*")
        found = Begun(daemon, daemon.pid(), int(pid_file.read_text()), pid_file.name.removeprefix("pid-"))
        daemon.signal(signal.SIGKILL)
        daemon.exit()
        assert alive(found.server)
        yield found
    finally:
        daemon.discard()
        for path in tmp_path.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def test_one_whose_client_lives_is_adopted_and_serves_on(left: Begun) -> None:
    with left.next() as second:
        assert second.chat().headers["X-Offloadd-Instance"] == "a-1"
        assert alive(left.server)
        assert left.stopped == []
    until(lambda: not alive(left.server), "the end of the daemon ends it", 20)


def test_one_whose_client_died_with_the_daemon_is_ended_before_another_is_begun(left: Begun) -> None:
    os.kill(left.client, signal.SIGKILL)
    until(lambda: not alive(left.client), "the client is gone")
    assert alive(left.server)
    with left.next() as second:
        assert not alive(left.server)
        assert [line.split()[0] for line in left.stopped] == [left.port]
        assert "a-1: of an earlier daemon; ended by its stop_command" in second.log
        assert second.chat().headers["X-Offloadd-Instance"] == "a-2"


def reaped(left: Begun) -> str:
    words = [sys.executable, "-m", "offloadd", "reap", str(left.daemon.data_dir)]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("client", ["lives", "is gone"])
def test_offloadd_reap_runs_it(left: Begun, client: str) -> None:
    if client == "is gone":
        os.kill(left.client, signal.SIGKILL)
        until(lambda: not alive(left.client), "the client is gone")
    said = reaped(left)
    assert not alive(left.server)
    assert not alive(left.client)
    assert left.stopped == [f"{left.port} "], "without the variables of the config, which it does not read"
    ended = "no process" if client == "is gone" else "1 process ended"
    assert said == f"{left.daemon.data_dir}: {ended}; a-1 ended by its stop_command"
    assert reaped(left).endswith("nothing is left running")
    assert len(left.stopped) == 1
    with left.next() as second:
        assert "of an earlier daemon" not in second.log
        assert second.chat().status == 200


def test_offloadd_reap_tells_of_one_that_fails_and_does_not_wait_for_ever(left: Begun) -> None:
    life = LifeBook(left.daemon.data_dir / "state.db")
    (written,) = life.lives()
    life.keep(replace(written, spec=replace(written.spec, stop_timeout=Seconds(0.5))))
    life.close()
    (left.daemon.folder / "stop-elsewhere").write_text("#!/bin/sh\nsleep 600\n")
    said = reaped(left)
    assert "; a-1: its stop_command failed: " in said
    assert said.endswith("/stop-elsewhere did not end within 0.5 s")
    assert "1 process ended" in said
    assert not alive(left.client)


def test_offloadd_reap_leaves_a_living_daemons_alone(left: Begun) -> None:
    with left.next():
        assert "left alone: another offloadd" in reaped(left)
        assert alive(left.server)
        assert left.stopped == []


def test_one_whose_engine_is_not_in_the_config_any_more_is_ended_too(left: Begun) -> None:
    usual = engines()
    del usual["own"]
    left.daemon.base["backends"] = usual
    left.daemon.write({"a": served_by("llamacpp")}, backends=usual)
    with left.next() as second:
        until(lambda: not alive(left.server) and not alive(left.client), "both are gone", 20)
        assert second.chat().status == 200


def test_the_command_of_the_launch_counts_and_not_what_the_config_says_by_now(left: Begun) -> None:
    changed = backends_of(left.daemon.folder, "stop-nothing")
    left.daemon.write({"a": served_by("own", run="never", stop_timeout="10s")}, backends=changed)
    with left.next():
        until(lambda: not alive(left.server), "it is ended as it was begun", 20)
        assert [line.split()[0] for line in left.stopped][:1] == [left.port]


def test_one_that_cannot_be_ended_is_told_and_does_not_keep_the_daemon_from_starting(left: Begun) -> None:
    os.kill(left.client, signal.SIGKILL)
    (left.daemon.folder / "stop-elsewhere").write_text("#!/bin/sh\nexit 3\n")
    with left.next() as second:
        assert "a-1: of an earlier daemon; stop_command:" in second.log
        assert "ended with exit code 3" in second.log
        assert second.chat().status == 200
