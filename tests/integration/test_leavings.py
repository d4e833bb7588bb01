"""What killed engines leave in temporary folders and in shared memory goes with them, whoever sees them dead, and nothing else."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conformance.processes import until
from tests.integration.daemon import Daemon, again, alive, launch, marked, running, supervised, wait_healthy
from tests.integration.engines import engines, hub_folder, served_by

SHARED = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not os.access(SHARED, os.W_OK), reason="no shared memory here")


def models(folder: Path, *names: str, **more: Any) -> dict[str, Any]:
    """Models on the stand-in of vLLM, each of which says in a file what it has made."""
    env = {"STANDIN_LEAVINGS": "1"}
    return {
        name: served_by("vllm", run="always", env={**env, "STANDIN_MARK_FILE": str(folder / f"marks-{name}")}, **more)
        for name in names
    }


def made(folder: Path, name: str = "a") -> list[Path]:
    """All that it has made, in order."""
    path = folder / f"marks-{name}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Path(words[2]) for line in lines if (words := line.split(" "))[1] == "made"]


def there(paths: list[Path]) -> list[Path]:
    return [path for path in paths if os.path.lexists(path)]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Of a test that fails."""
    yield
    for path in tmp_path.glob("marks-*"):
        for left in made(tmp_path, path.name.removeprefix("marks-")):
            if left.parent == SHARED:
                left.unlink(missing_ok=True)


def start(folder: Path, *names: str) -> Daemon:
    hub_folder(folder)
    return launch(folder, models(folder, *names), backends=engines())


def tree(daemon: Daemon, name: str = "a") -> list[psutil.Process]:
    leader = psutil.Process(daemon.pid(name))
    return [leader, *leader.children(recursive=True)]


def remembered(daemon: Daemon, name: str = "a") -> None:
    """Until it is written down what its processes have: it was looked at more than once while they loaded."""
    pieces = [path.name for path in made(daemon.folder, name) if path.parent == SHARED]
    assert len(pieces) == 2
    state = daemon.data_dir / "state.db-wal"
    until(lambda: all(piece.encode() in state.read_bytes() for piece in pieces), "it is written down", 10)


def test_all_that_it_has_made_goes_with_it(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    with running(tmp_path, models(tmp_path, "a", "b"), backends=engines()) as daemon:
        old, first, others = tree(daemon), made(tmp_path), (daemon.pid("b"), made(tmp_path, "b"))[1]
        assert [path.parent == SHARED for path in first] == [False, False, True, True]
        assert there(first) == first
        folder = first[0].parent
        assert folder == first[1].parent, "sockets and temporary files lie together"
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
        remembered(daemon)
        os.kill(old[0].pid, signal.SIGKILL)
        until(lambda: not any(alive(each.pid) for each in old), "all of it is gone")
        until(lambda: not there([folder, *first]), "what it has left is gone", 20)
        daemon.wait_for("a")
        assert "a-1 left 2 pieces of shared memory; taken away" in daemon.log
        assert there(others) == others, "what another has, which lives"
        assert daemon.chat("b").status == 200
        second = made(tmp_path)[4:]
        assert there(second) == second
    assert not there([*second, *others])
    assert not folder.parent.exists()


def test_shared_memory_of_a_stranger_stays(tmp_path: Path) -> None:
    """Also one whose name could be an engine's, and one that an engine has mapped too."""
    stranger = SHARED / f"psm_{secrets.token_hex(4)}"
    stranger.write_bytes(b"x" * 4096)
    stranger.chmod(0o600)
    hub_folder(tmp_path)
    try:
        with running(tmp_path, models(tmp_path, "a"), backends=engines()) as daemon:
            daemon.pid()
            queue = made(tmp_path)[2]
            remembered(daemon)
            with queue.open("rb"):
                daemon.post("/models/a/unload?wait=1", None)
                assert not there(made(tmp_path)[:2])
                assert there([queue]), "we have it open still"
            queue.unlink()
        assert stranger.read_bytes() == b"x" * 4096
    finally:
        stranger.unlink()


def test_a_daemon_that_adopts_it_knows_what_it_has(tmp_path: Path) -> None:
    daemon = start(tmp_path, "a")
    try:
        pid = wait_healthy(daemon).pid()
        daemon.signal(signal.SIGKILL)
        daemon.exit()
        with supervised(again(tmp_path, daemon.config_path, daemon.base)) as second:
            assert second.pid() == pid
            assert there(made(tmp_path)) == made(tmp_path), "it lives, and needs them"
            os.kill(pid, signal.SIGKILL)
            until(lambda: not there(made(tmp_path)[:4]), "what it has left is gone", 20)
    finally:
        daemon.discard()


def test_what_ended_while_no_daemon_was_there_is_taken_away_by_the_next(tmp_path: Path) -> None:
    daemon = start(tmp_path, "a")
    try:
        old = tree(wait_healthy(daemon))
        remembered(daemon)
        daemon.signal(signal.SIGKILL)
        daemon.exit()
        for each in old:
            each.kill()
        until(lambda: not any(alive(each.pid) for each in old), "all of it is gone")
        first = made(tmp_path)
        assert there(first) == first
        with supervised(again(tmp_path, daemon.config_path, daemon.base)) as second:
            assert not there(first)
            second.wait_for()
    finally:
        daemon.discard()


def test_offloadd_reap_takes_it_away(tmp_path: Path) -> None:
    daemon = start(tmp_path, "a")
    try:
        wait_healthy(daemon).pid()
        daemon.signal(signal.SIGKILL)
        daemon.exit()
        folder = made(tmp_path)[0].parent
        words = [sys.executable, "-m", "offloadd", "reap", str(daemon.data_dir)]
        assert "ended" in subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
        assert not marked(daemon.data_dir)
        assert not there(made(tmp_path))
        assert not folder.parent.exists()
    finally:
        daemon.discard()


def test_the_operators_own_folder_wins_and_is_left_alone(tmp_path: Path) -> None:
    """Sockets are in the launch's own folder all the same: his may be too deep for their names."""
    his = tmp_path / "his"
    his.mkdir()
    hub_folder(tmp_path)
    changed = models(tmp_path, "a")
    changed["a"]["env"]["TMPDIR"] = str(his)
    with running(tmp_path, changed, backends=engines()) as daemon:
        daemon.pid()
        socket, temporary, *_ = made(tmp_path)
        assert temporary.parent == his
        assert socket.parent != his
    assert there([temporary]) == [temporary]
    assert not there([socket])


def test_the_sockets_of_tgis_shards_are_in_it(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    with running(tmp_path, {"a": served_by("tgi", run="always")}, backends=engines()) as daemon:
        leader = psutil.Process(daemon.pid())
        words = leader.cmdline()
        shard = Path(f"{words[words.index('--shard-uds-path') + 1]}-0")
        assert shard.is_socket()
        assert leader.environ()["TMPDIR"] == str(shard.parent)
        leader.kill()
        until(lambda: not there([shard, shard.parent]), "it went with the launcher", 20)
        daemon.wait_for()
