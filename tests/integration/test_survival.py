"""A daemon that died and came back: it finds its living servers and serves on with them; what it cannot vouch for it stops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.integration.daemon import (
    Daemon,
    again,
    alive,
    launch,
    marked,
    marks,
    model,
    replace_file,
    running,
    supervised,
    wait_healthy,
)

SLOW_TOKENS = {"STANDIN_TOKEN_S": 0.02}


def kill9(daemon: Daemon) -> None:
    """End the daemon, and nothing else."""
    daemon.signal(signal.SIGKILL)
    daemon.exit()


@contextlib.contextmanager
def begun(folder: Path, models: Mapping[str, Any], **options: Any) -> Iterator[Daemon]:
    """A daemon that is to be killed; whatever it leaves is cleared away at the end."""
    daemon = launch(folder, models, **options)
    try:
        yield wait_healthy(daemon)
    finally:
        daemon.discard()
        print(f"--- {daemon.log_path}\n{daemon.log}")


def next_daemon(first: Daemon, **options: Any) -> contextlib.AbstractContextManager[Daemon]:
    return supervised(again(first.folder, first.config_path, first.base, **options))


def test_two_models_with_streams_are_served_on_by_the_same_processes(tmp_path: Path) -> None:
    models = {name: model(env={**SLOW_TOKENS, "STANDIN_MARK_FILE": tmp_path / name}) for name in ("a", "b")}
    with begun(tmp_path, models) as first:
        old = {name: first.pid(name) for name in models}
        with first.stream("a") as one, first.stream("b") as other:
            one.skip(3)
            other.skip(3)
            kill9(first)
            assert "[DONE]" not in [*one, *other]
        written = (first.data_dir / "logs/a-1.log").stat().st_size
        with next_daemon(first) as second:
            assert second.chat("a").headers["X-Offloadd-Instance"] == "a-1"
            assert second.chat("b").headers["X-Offloadd-Instance"] == "b-1"
            assert {name: second.pid(name) for name in models} == old
            assert [marks(tmp_path / name).count("start") for name in models] == [1, 1]
            assert (second.data_dir / "logs/a-1.log").stat().st_size > written
            assert "still runs as pid" in second.log
        assert not any(alive(pid) for pid in old.values())


def test_the_end_of_an_adopted_one_is_noticed_and_answered(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model(env={"STANDIN_FORK_GRANDCHILD": 600})}) as first:
        pid = first.pid()
        kill9(first)
        with next_daemon(first) as second:
            assert second.pid() == pid
            os.kill(pid, signal.SIGKILL)
            until(lambda: second.pids() not in ([], [pid]), "another one starts")
            assert second.pid() != pid
            assert "exit code unknown" in second.log or "killed by SIGKILL" in second.log, "as the kernel tells"
            until(lambda: len(second.leftovers()) == 2, "of the first one nothing is left, its grandchild included")


def test_one_that_loads_is_adopted_and_not_started_twice(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model(env={"STANDIN_LOAD_S": 2, "STANDIN_MARK_FILE": tmp_path / "marks"})}) as first:
        (pid,) = until(first.pids, "it starts")
        kill9(first)
        with next_daemon(first) as second:
            assert second.pid() == pid
            assert marks(tmp_path / "marks").count("start") == 1


def test_what_the_config_no_longer_names_is_stopped_and_what_it_changed_is_replaced(tmp_path: Path) -> None:
    with begun(tmp_path, {name: model() for name in ("a", "b", "c")}) as first:
        old = {name: first.pid(name) for name in ("a", "b", "c")}
        kill9(first)
        first.write({"a": model(), "b": model(context=4096)})
        with next_daemon(first) as second:
            until(lambda: not alive(old["c"]), "c is stopped")
            assert second.chat("b").status == 200
            until(lambda: not alive(old["b"]), "b is replaced")
            assert second.pid("b") != old["b"]
            assert second.pid("a") == old["a"]


def test_a_process_that_nobody_can_vouch_for_is_stopped(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model()}) as first:
        pid = first.pid()
        kill9(first)
        environment = {**os.environ, "OFFLOADD_DATA_DIR": str(first.data_dir), "OFFLOADD_INSTANCE": "a-1@forged"}
        stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
        until(lambda: stranger.pid in marked(first.data_dir), "the stranger has its environment")
        with next_daemon(first) as second:
            assert second.pid() == pid
            assert stranger.wait(10) == -signal.SIGKILL
            assert "killed 1 processes of an earlier daemon that nobody can vouch for" in second.log


def test_a_server_that_does_not_hold_its_port_any_more_is_not_trusted(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model()}) as first:
        pid = first.pid()
        kill9(first)
        # As if another program had taken its pid: the same number, and not the start that was written down.
        subprocess.run(
            [sys.executable, "-c", _FORGE, str(first.data_dir / "state.db")],
            check=True,
        )
        with next_daemon(first) as second:
            until(lambda: not alive(pid), "it is stopped")
            assert second.chat("a").headers["X-Offloadd-Instance"] == "a-2"


_FORGE = """
import json, sqlite3, sys
with sqlite3.connect(sys.argv[1]) as db:
    for mark, body in db.execute("select mark, body from life").fetchall():
        body = json.loads(body)
        body["process"][1] += 1
        db.execute("update life set body = ? where mark = ?", (json.dumps(body), mark))
"""


@pytest.mark.parametrize("damage", [b"this is no database at all, and long enough to be read as a header" * 20, b""])
def test_damaged_state_is_set_aside_and_the_servers_begun_anew(tmp_path: Path, damage: bytes) -> None:
    with begun(tmp_path, {"a": model()}) as first:
        pid = first.pid()
        kill9(first)
        for path in first.data_dir.glob("state.db*"):
            path.unlink()
        (first.data_dir / "state.db").write_bytes(damage)
        with next_daemon(first) as second:
            assert second.pid() != pid
            assert not alive(pid)
            aside = list(second.data_dir.glob("state.db.damaged-*"))
            assert bool(aside) == bool(damage)
            problems = [problem["what"] for problem in second.get("/health")["problems"]]
            assert any("state.db was damaged" in what for what in problems) == bool(damage)


def test_what_was_given_up_stays_so_over_a_death_and_is_tried_again_after_a_good_end(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model(restart={"give_up_after": 1}, env={"STANDIN_CRASH_AT_START": 3})}) as first:
        first.wait_for("a", "failed")
        files = sorted(first.data_dir.glob("state.db*"))
        until(lambda: any(b"exit code 3" in file.read_bytes() for file in files), "it is written down")
        kill9(first)
        with next_daemon(first) as second:
            assert "given up after 1 " in second.wait_for("a", "failed")["reason"]
            assert second.launches() == 1
        with next_daemon(first) as third:
            third.wait_for("a", "failed")
            assert third.launches() == 2


def test_without_control_groups_nothing_is_different(tmp_path: Path) -> None:
    patches = {"offloadd.runtime.launchers.cgroups.USED": False}
    with begun(tmp_path, {"a": model(env={"STANDIN_FORK_GRANDCHILD": 600})}, patches=patches) as first:
        pid = first.pid()
        kill9(first)
        with next_daemon(first, patches=patches) as second:
            assert second.pid() == pid
            os.kill(pid, signal.SIGTERM)
            until(lambda: second.pids() not in ([], [pid]), "another one starts")
            until(lambda: len(second.leftovers()) == 2, "the first one's grandchild is gone")


def test_kept_servers_outlive_a_clean_end(tmp_path: Path) -> None:
    with begun(tmp_path, {"a": model(env=SLOW_TOKENS)}) as first:
        pid = first.pid()
        first.base["server"]["on_stop"] = "keep"  # type: ignore[index]
        first.apply({"a": model(env=SLOW_TOKENS)})
        with first.stream("a", 30) as stream:
            stream.skip(1)
            first.term()
            assert list(stream)[-1] == "[DONE]"
        assert first.exit() == 0
        assert "1 instances run on (server.on_stop: keep)" in first.log
        assert alive(pid)
        first.base["server"]["on_stop"] = "stop"  # type: ignore[index]
        first.write({"a": model(env=SLOW_TOKENS)})
        with next_daemon(first) as second:
            assert second.pid() == pid
        assert not alive(pid)


# --- death between every two effects ---------------------------------------------------------------------------------------------

_POINTS = """\
import os, signal
from offloadd.registry.lives import LifeBook
from offloadd.runtime.launchers.local import LocalLauncher

point = os.environ["DIE_AT"]

def stage(life):
    return "stop" if life.stopping else "ready" if life.ready_at else "record" if life.process else "intent"

def die(here):
    if here == point:
        os.kill(os.getpid(), signal.SIGKILL)

keep, drop, spawn = LifeBook.keep, LifeBook.drop, LocalLauncher.spawn

def keep_or_die(self, life):
    die("before " + stage(life))
    keep(self, life)
    die("after " + stage(life))

def drop_or_die(self, mark):
    die("before drop")
    drop(self, mark)
    die("after drop")

def spawn_or_die(self, *args, **named):
    die("before spawn")
    process = spawn(self, *args, **named)
    die("after spawn")
    return process

LifeBook.keep, LifeBook.drop, LocalLauncher.spawn = keep_or_die, drop_or_die, spawn_or_die
from offloadd.cli import main
main()
"""
START = ["before intent", "after intent", "after spawn", "after record", "after ready"]
STOP = ["before stop", "after stop", "after drop"]
"""After one effect is before the next: what lies between is the same."""


def dying(folder: Path, point: str, env: Mapping[str, str]) -> Daemon:
    """A daemon that kills itself at the point."""
    whole = launch(folder, {"a": model(env={"STANDIN_MARK_FILE": folder / "marks", **env})})
    whole.process.kill()
    whole.process.wait()
    log_path = folder / "dying.log"
    argv = [sys.executable, "-c", _POINTS, "run", "-c", str(whole.config_path)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(argv, env={**os.environ, "DIE_AT": point}, stdout=log, stderr=log, start_new_session=True)
    return Daemon(process, whole.port, folder, whole.config_path, log_path, whole.base)


@pytest.mark.parametrize("point", START + STOP)
def test_a_death_between_any_two_effects_ends_in_one_process(tmp_path: Path, point: str) -> None:
    first = dying(tmp_path, point, {})
    try:
        if point in STOP:
            wait_healthy(first)
            first.pid()
            with contextlib.suppress(OSError, AssertionError):
                first.apply({"a": model(run="never", env={"STANDIN_MARK_FILE": tmp_path / "marks"})})
        assert first.exit(30) == -signal.SIGKILL, first.log
        replace_file(first.config_path, first.config_path.read_text().replace('"never"', '"always"'))
        with next_daemon(first) as second:
            pid = second.pid()
            time.sleep(0.2)  # for a second one to show, if there were any
            assert second.pids() == [pid]
            assert second.leftovers() == [pid]
            assert second.chat("a").status == 200
            if point in ("after spawn", "after record", "after ready"):
                assert marks(tmp_path / "marks").count("start") == 1, "the first process serves on"
    finally:
        first.discard()
        print(first.log)


# --- a newer program in the same process ------------------------------------------------------------------------------------------


def test_a_new_start_in_place_keeps_sockets_and_servers_and_refuses_nobody(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW_TOKENS), "b": model()}) as daemon:
        old = {name: daemon.pid(name) for name in ("a", "b")}
        stop = threading.Event()
        asked = [daemon.threads.submit(keep_asking, daemon, stop) for _ in range(3)]
        with daemon.stream("a", 40) as stream:
            stream.skip(1)
            daemon.signal(signal.SIGUSR2)
            assert list(stream)[-1] == "[DONE]", "a stream that runs may end"
        until(lambda: daemon.log.count("offloadd 0.1.0 started") == 2, "the new program runs", 30)
        until(lambda: daemon.state("b") == "ready", "b serves on")
        time.sleep(0.3)
        stop.set()
        answers = [answer for one in asked for answer in one.result()]
        assert set(answers) == {200}, answers
        assert daemon.process.poll() is None
        assert {name: daemon.pid(name) for name in ("a", "b")} == old
        os.kill(old["b"], signal.SIGKILL)
        until(lambda: daemon.pids("b") not in ([], [old["b"]]), "it is our child still, and its end is seen")
        assert "killed by SIGKILL" in daemon.log


def keep_asking(daemon: Daemon, stop: threading.Event) -> list[int | str]:
    """A new connection for every request, one after another: how each went."""
    found: list[int | str] = []
    while not stop.is_set():
        try:
            found.append(daemon.chat("b", 2).status)
        except OSError as error:
            found.append(repr(error))
    return found


def test_a_new_program_that_would_not_do_takes_no_place(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as daemon:
        pid = daemon.pid()
        good = daemon.config_path.read_text()
        daemon.config_path.write_text("{")
        daemon.signal(signal.SIGUSR2)
        until(lambda: "not replaced: the program that is installed now would not do" in daemon.log, "it is refused", 30)
        daemon.config_path.write_text(good)
        assert daemon.pid() == pid
        assert daemon.chat().status == 200


def test_a_storm_of_signals_does_not_end_it(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as daemon:
        pid = daemon.pid()
        daemon.signal(signal.SIGUSR2)
        deadline = time.monotonic() + 30
        while daemon.log.count("offloadd 0.1.0 started") < 2:
            assert time.monotonic() < deadline, daemon.log
            daemon.signal(signal.SIGHUP)
            daemon.signal(signal.SIGUSR2)
            time.sleep(0.005)
        assert daemon.pid() == pid


def test_told_to_end_while_it_hands_over(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW_TOKENS)}) as daemon:
        daemon.pid()
        with daemon.stream("a", 500) as stream:
            stream.skip(1)
            daemon.signal(signal.SIGUSR2)
            until(lambda: "a new start of the program takes our place" in daemon.log, "it is on its way", 30)
            daemon.term()
            assert daemon.exit() == 0
        assert not daemon.leftovers()


def test_a_scheduler_that_completes_no_cycle_is_told(tmp_path: Path) -> None:
    patches = {"offloadd.runtime.reconciler.plan": None, "offloadd.control.STALLED": 2.0}
    with begun(tmp_path, {"a": model()}, patches=patches) as daemon:
        reply = until(lambda: (found := daemon.request("GET", "/health")).status == 503 and found, "it is told")
        assert any("the last reconcile cycle failed" in problem["what"] for problem in reply.json()["problems"])
        daemon.term()
        assert daemon.exit() == 0
