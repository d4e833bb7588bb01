"""The daemon itself killed, frozen, doubled, signalled; its disk, its databases and its config spoilt."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conformance.servers import HOST, until
from tests.faults.table import Outcome, Place, answers_again, fault
from tests.integration.daemon import (
    Daemon,
    again,
    alive,
    launch,
    marks,
    model,
    replace_file,
    running,
    supervised,
    wait_healthy,
)
from tests.integration.test_reload import swap, text_of

SLOW = {"STANDIN_TOKEN_S": 0.02}


@contextlib.contextmanager
def begun(place: Place, models: dict[str, Any], **options: Any) -> Iterator[Daemon]:
    """A daemon that is to be killed."""
    daemon = launch(place.folder, models, **options)
    try:
        yield wait_healthy(daemon)
    finally:
        daemon.discard()


def kill9(daemon: Daemon) -> float:
    """End the daemon and nothing else; when that was."""
    daemon.signal(signal.SIGKILL)
    daemon.exit()
    return time.monotonic()


def successor(first: Daemon) -> Any:
    return supervised(again(first.folder, first.config_path, first.base))


@fault(13, "kill -9 of the daemon, two models ready, two streams running", real=True)
def daemon_killed(place: Place) -> Outcome:
    real = place.real_one()
    with begun(place, {"a": real.model(), "b": real.model()}, llamacpp=real.llamacpp) as first:
        old = {name: first.pid(name) for name in ("a", "b")}
        with first.stream("a", 300, ignore_eos=True) as one, first.stream("b", 300, ignore_eos=True) as other:
            one.skip(3)
            other.skip(3)
            since = kill9(first)
            assert all("[DONE]" not in list(stream) for stream in (one, other))
        with successor(first) as second:
            recovery = max(answers_again(second, since, name) for name in old)
            assert {name: second.pid(name) for name in old} == old
            assert [second.launches(name) for name in old] == [1, 1]
            return Outcome("both streams broke off; then served by the same processes, no model loaded again", recovery)


@fault(13, "the same, twelve servers")
def daemon_killed_with_many(place: Place) -> Outcome:
    names = [f"m{number}" for number in range(12)]
    with begun(place, {name: model() for name in names}) as first:
        old = {name: first.wait_for(name, within_s=60)["instances"][0]["pid"] for name in names}
        since = kill9(first)
        with successor(first) as second:
            recovery = max(answers_again(second, since, name) for name in names)
            assert {name: second.pid(name) for name in names} == old
            return Outcome("served by the same twelve processes", recovery)


@fault(14, "kill -9 of the daemon while a model loads")
def daemon_killed_in_a_start(place: Place) -> Outcome:
    env = {"STANDIN_LOAD_S": 2, "STANDIN_MARK_FILE": place.folder / "marks"}
    with begun(place, {"a": model(env=env)}) as first:
        (pid,) = until(first.pids, "it starts")
        since = kill9(first)
        with successor(first) as second:
            recovery = answers_again(second, since)
            assert second.pid() == pid
            assert marks(place.folder / "marks").count("start") == 1
            return Outcome("the load went on in the same process; no second one", recovery)


@fault(15, "a second daemon on the same data folder")
def two_daemons(place: Place) -> Outcome:
    with running(place.folder, {"a": model()}) as daemon:
        pid = daemon.pid()
        second = again(place.folder, daemon.config_path, daemon.base)
        assert second.exit() == 1
        assert f"another offloadd (pid {daemon.process.pid})" in second.log
        assert daemon.pid() == pid
        return Outcome("nothing: the second ends with exit 1 and names the first")


@fault(18, "the daemon hangs, and its watchdog kills it")
def daemon_hangs(place: Place) -> Outcome:
    with begun(place, {"a": model()}) as first:
        pid = first.pid()
        first.signal(signal.SIGSTOP)
        since = time.monotonic()
        time.sleep(0.5)  # as long as the watchdog would look on
        kill9(first)
        with successor(first) as second:
            recovery = answers_again(second, since)
            assert second.pid() == pid
            return Outcome("served by the same process", recovery)


@fault(19, "SIGTERM with a stream running, and SIGTERM again")
def sigterm_twice(place: Place) -> Outcome:
    with running(place.folder, {"a": model(env=SLOW)}) as daemon:
        daemon.pid()
        with daemon.stream("a", 2000) as stream:
            stream.skip(1)
            daemon.term()
            until(lambda: "stopping: no new requests" in daemon.log, "it drains")
            since = time.monotonic()
            daemon.term()
            code = list(stream)[-1]["error"]["code"]
        assert daemon.exit() == 0
        took = time.monotonic() - since
        assert not daemon.leftovers()
        return Outcome(f"SSE error {code}; exit 0 {took:.1f} s after the second, nothing left")


@fault(20, "500 SIGHUPs in a second, the config changed among them")
def sighup_storm(place: Place) -> Outcome:
    with running(place.folder, {"a": model(env=SLOW)}) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 60) as stream:
            for number in range(500):
                if number == 250:
                    daemon.write({"a": model(env=SLOW), "b": model()})
                daemon.hup()
                time.sleep(0.001)
            since = time.monotonic()
            until(lambda: daemon.names() == ["a", "b"], "the last content wins")
            took = time.monotonic() - since
            assert list(stream)[-1] == "[DONE]"
        assert daemon.pids("a") == [pid]
        return Outcome("the stream ended whole; the last content is in force", took)


@fault(21, "SIGHUP all the time, from the program's first line on")
def signals_at_start(place: Place) -> Outcome:
    daemon = launch(place.folder, {"a": model()})
    try:
        until(lambda: ignores_sighup(daemon.process.pid), "Python has begun")
        begin = time.monotonic()
        while "started" not in daemon.log and time.monotonic() - begin < 30:
            daemon.hup()
            time.sleep(0.005)
        wait_healthy(daemon)
        assert daemon.chat().status == 200
        daemon.close()
    finally:
        daemon.discard()
    return Outcome("nothing: it starts")


def ignores_sighup(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(line.startswith("SigIgn:") and int(line.split()[1], 16) & 1 for line in lines)


@fault(22, "a YAML bomb as the config")
def yaml_bomb(place: Place) -> Outcome:
    with running(place.folder, {"a": model()}) as daemon:
        pid = daemon.pid()
        levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
        since = time.monotonic()
        replace_file(daemon.config_path, "\n".join(["l0: &l0 [x, x]", *levels]))
        assert daemon.post("/reload", None).status == 400
        took = time.monotonic() - since
        assert took < 5
        assert daemon.chat().status == 200
        assert daemon.pid() == pid
        return Outcome(f"refused in {took * 1000:.0f} ms; the old config serves on")


@fault(26, "the config emptied, deleted, made a folder, a FIFO, a broken link")
def config_gone(place: Place) -> Outcome:
    def fifo(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def dangling(path: Path) -> None:
        path.unlink()
        path.symlink_to("nowhere")

    with running(place.folder, {"a": model()}) as daemon:
        pid = daemon.pid()
        for spoil in (lambda path: path.write_text(""), Path.unlink, folder, fifo, dangling):
            spoil(daemon.config_path)
            assert daemon.post("/reload", None).status == 400
            assert daemon.chat().status == 200
            if daemon.config_path.is_dir():
                daemon.config_path.rmdir()
            daemon.apply({"a": model()})
        assert daemon.pid() == pid
        return Outcome("200 all along; each told in /health, the old config kept")


@fault(27, "the config written in steps of 50 bytes")
def half_written(place: Place) -> Outcome:
    with running(place.folder, {}) as daemon:
        text = text_of(daemon, "a", "b")
        with daemon.config_path.open("w") as file:
            for start in range(0, len(text), 50):
                file.write(text[start : start + 50])
                file.flush()
                time.sleep(0.01)
        since = time.monotonic()
        until(lambda: daemon.names() == ["a", "b"], "it is taken up")
        return Outcome("taken up when whole", time.monotonic() - since)


@fault(28, "an editor's new file renamed over the config, twice")
def renamed_over(place: Place) -> Outcome:
    with running(place.folder, {}) as daemon:
        slowest = 0.0
        for names in (["a"], ["a", "b"]):
            replace_file(daemon.config_path, text_of(daemon, *names))
            since = time.monotonic()
            until(lambda names=names: daemon.names() == names, "it is taken up")
            slowest = max(slowest, time.monotonic() - since)
        return Outcome("both taken up", slowest)


@fault(29, "a symbolic link two steps up swapped, as NixOS does it with /etc/static")
def nix_swap(place: Place) -> Outcome:
    for number in (1, 2):
        (place.folder / f"store-{number}").mkdir()
    static, etc = place.folder / "static", place.folder / "etc"
    etc.mkdir()
    static.symlink_to(place.folder / "store-1")
    (etc / "offloadd.json").symlink_to(static / "offloadd.json")
    with running(place.folder, {}, config_path=etc / "offloadd.json") as daemon:
        (place.folder / "store-2" / "offloadd.json").write_text(text_of(daemon, "a"))
        swap(static, place.folder / "store-2")
        since = time.monotonic()
        until(lambda: daemon.names() == ["a"], "it is taken up")
        return Outcome("taken up", time.monotonic() - since)


@fault(31, "50 reloads while 8 streams run")
def reloads_under_streams(place: Place) -> Outcome:
    fixed = {"a": model(parallel=8, env=SLOW)}
    with running(place.folder, fixed) as daemon:
        pid = daemon.pid()
        streams = [daemon.threads.submit(daemon.events, "a", 100) for _ in range(8)]
        for number in range(50):
            daemon.apply({**fixed, **({"b": model(run="on-demand", priority=number)} if number % 2 else {})})
        assert all(stream.result()[-1] == "[DONE]" for stream in streams)
        assert daemon.pids("a") == [pid]
        return Outcome("all 8 streams whole, the process the same")


@fault(33, "the API's port is taken")
def port_in_use(place: Place) -> Outcome:
    daemon = launch(place.folder, {"a": model()})
    with socket.socket() as holder:
        holder.bind((HOST, daemon.port))
        holder.listen()
        try:
            assert daemon.exit() == 1
            assert "cannot listen on" in daemon.log
        finally:
            daemon.discard()
    return Outcome("exit 1 that says how to find the holder; nothing was started")


@fault(35, "no byte can be written any more, a server dies meanwhile")
def disk_full(place: Place) -> Outcome:
    with running(place.folder, {"a": model(), "b": model()}) as daemon:
        pid, other = daemon.pid("a"), daemon.pid("b")
        _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        since = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        recovery = answers_again(daemon, since)
        assert daemon.chat("b").status == 200
        problems = [problem["what"] for problem in daemon.get("/health")["problems"]]
        assert any("cannot be written" in what for what in problems), problems
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        until(lambda: not any("own state" in p["what"] for p in daemon.get("/health")["problems"]), "it catches up")
        assert daemon.pid("b") == other
        return Outcome("200; told in /health until the disk has room, then caught up", recovery)


@fault(37, "the daemon's state.db is garbage at its start")
def state_damaged(place: Place) -> Outcome:
    with begun(place, {"a": model()}) as first:
        pid = first.pid()
        since = kill9(first)
        for path in first.data_dir.glob("state.db-*"):
            path.unlink()  # the write-ahead log alone would bring it all back
        (first.data_dir / "state.db").write_bytes(b"garbage" * 1000)
        with successor(first) as second:
            recovery = answers_again(second, since)
            assert not alive(pid)
            assert list(second.data_dir.glob("state.db.damaged-*"))
            assert any("was damaged" in problem["what"] for problem in second.get("/health")["problems"])
            return Outcome("set aside and told; what nobody can vouch for is begun anew", recovery)


@fault(38, "state.db and registry.db held by another program")
def state_locked(place: Place) -> Outcome:
    with running(place.folder, {"a": model()}) as daemon:
        pid = daemon.pid()
        with contextlib.ExitStack() as stack:
            for name in ("state.db", "registry.db"):
                other = stack.enter_context(contextlib.closing(sqlite3.connect(daemon.data_dir / name, isolation_level=None)))
                other.execute("BEGIN IMMEDIATE")
            since = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            recovery = answers_again(daemon, since)
        return Outcome("200 from a new process; its record is caught up with later", recovery)


@fault(39, "state.db of a newer offloadd")
def state_newer(place: Place) -> Outcome:
    with begun(place, {"a": model()}) as first:
        pid = first.pid()
        kill9(first)
        with contextlib.closing(sqlite3.connect(first.data_dir / "state.db")) as other:
            other.execute("PRAGMA user_version = 99")
        second = again(first.folder, first.config_path, first.base)
        assert second.exit() == 1
        assert "state.db has schema 99" in second.log
        assert alive(pid)
        return Outcome("exit 1 that says what to do; the file is left as it is, and so are the servers")


@fault(0, "SIGUSR2 under requests: a newer program in the same process")
def replaced_in_place(place: Place) -> Outcome:
    with running(place.folder, {"a": model()}) as daemon:
        pid = daemon.pid()
        daemon.signal(signal.SIGUSR2)
        slowest, count = 0.0, 0
        begin = time.monotonic()
        while daemon.log.count(" started") < 2 or count < 20:
            assert time.monotonic() - begin < 60
            since = time.monotonic()
            assert daemon.chat("a", 1).status == 200
            slowest, count = max(slowest, time.monotonic() - since), count + 1
        assert daemon.pid() == pid
        return Outcome(f"all {count} requests 200; the slowest, which met the change, took {slowest * 1000:.0f} ms")


@fault(59, "the model's file cut in half")
def model_cut(place: Place) -> Outcome:
    with running(place.folder, {"a": model(vram="auto", run="on-demand")}) as daemon:
        path = place.folder / "model.gguf"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        found = daemon.chat()
        assert found.status == 503, found
        message = found.json()["error"]["message"]
        since = time.monotonic()
        path.write_bytes(whole)
        recovery = answers_again(daemon, since)
        assert json.dumps(message)
        return Outcome("503 that names the file's trouble; well once the file is whole", recovery)
