"""The daemon and its registry: killed, damaged, out of disk."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests import postgres
from tests.conformance.servers import until
from tests.integration.daemon import Daemon, again, launch, model, running, supervised
from tests.integration.test_discovery import FOUND, PATIENT_S


@contextlib.contextmanager
def started_again(before: Daemon) -> Iterator[Daemon]:
    with supervised(again(before.folder, before.config_path, before.base)) as daemon:
        yield daemon


def problems(daemon: Daemon) -> list[str]:
    return [problem["what"] for problem in daemon.get("/health")["problems"]]


def counted(daemon: Daemon) -> Any:
    """Requests that the registry has on disk: asking for them writes what waits."""
    return [(day["day"], day["answered"]) for day in daemon.look()["history"]["days"]]


def test_what_was_told_survives_kill_9_and_a_damaged_file_is_named_and_begun_anew(tmp_path: Path) -> None:
    first = launch(tmp_path, {"a": model(run="on-demand")}, **FOUND)
    try:
        with contextlib.suppress(AssertionError), supervised(first):
            assert [first.chat("a").status for _ in range(3)] == [200] * 3
            told = counted(first)
            assert told[0][1] == 3
            first.signal(signal.SIGKILL)
            first.process.wait()
            raise AssertionError("it did not end well, as is meant")
    finally:
        first.discard()
    with started_again(first) as second:
        assert counted(second) == told
        assert not [what for what in problems(second) if "registry" in what]
    path = first.data_dir / "registry.db"
    path.write_bytes(path.read_bytes()[:5000])
    with started_again(first) as third:
        assert [what for what in problems(third) if "the registry was damaged; the old file is" in what]
        assert third.chat("a").status == 200
        until(lambda: not [what for what in problems(third) if "registry" in what], "it is well again", PATIENT_S)
        assert counted(third)[0][1] == 1
    assert list(first.data_dir.glob("registry.db.damaged-*"))


def test_a_full_disk_is_named_and_nothing_is_lost_once_there_is_room(tmp_path: Path) -> None:
    with supervised(launch(tmp_path, {"a": model(run="on-demand")}, **FOUND)) as daemon:
        assert daemon.chat("a").status == 200
        assert counted(daemon)[0][1] == 1
        process = psutil.Process(daemon.process.pid)
        _, hard = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (1024, hard))  # no file of the daemon grows beyond it: a disk without room
        try:
            assert [daemon.chat("a").status for _ in range(3)] == [200] * 3
            until(lambda: [what for what in problems(daemon) if "the registry cannot be written" in what], "it is told", PATIENT_S)
            assert daemon.get("/health")["status"] == "degraded"
            assert daemon.chat("a").status == 200
            assert daemon.look()["usage"]["answered"] == 5  # what is known is shown, written or not
        finally:
            process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        until(lambda: not [what for what in problems(daemon) if "registry" in what], "it is well again", PATIENT_S)
        assert counted(daemon)[0][1] == 5
        assert os.path.exists(daemon.data_dir / "registry.db")


def test_daemons_share_a_registry_on_postgresql(tmp_path: Path) -> None:
    with postgres.server() as server:
        url = server.new_database()
        for number in (1, 2):
            folder = tmp_path / f"daemon-{number}"
            folder.mkdir()
            storage = {"data_dir": str(folder / "data"), "models_path": [str(folder)], "registry": url}
            with running(folder, {"a": model(run="on-demand")}, storage=storage, **FOUND) as daemon:
                assert daemon.chat("a").status == 200
                assert counted(daemon)[0][1] == number
                assert not (daemon.data_dir / "registry.db").exists()
                assert "unused-secret" not in daemon.request("GET", "/config").body.decode()
                if number == 2:
                    server.stop()
                    until(lambda: daemon.chat("a").status == 200 and problems(daemon), "its absence is told", PATIENT_S)
                    server.start()
                    until(lambda: not [what for what in problems(daemon) if "registry" in what], "it is found again", PATIENT_S)
                assert "unused-secret" not in daemon.log
