"""`offloadctl` against the real daemon: what it shows, how it follows, talks, and fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from offloadd.ctl import main
from tests.conformance.servers import HOST, until
from tests.integration.daemon import CHAT, Daemon, chat, model, running

WITHIN_S = 60.0
CTL = [sys.executable, "-c", "from offloadd.ctl import main; main()"]


def environment(server: str) -> dict[str, str]:
    return {"OFFLOADD_SERVER": server, "COLUMNS": "200", "LINES": "50", "TERM": "xterm"}


def ctl(daemon: Daemon | str, *words: str, code: int = 0, given: str = "", env: Mapping[str, str] | None = None) -> Said:
    """Run the command to its end, which must be with this exit code."""
    server = daemon if isinstance(daemon, str) else f"http://{HOST}:{daemon.port}"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name, value in {**environment(server), **(env or {})}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["offloadctl", *words])
        patch.setattr(sys, "stdin", io.StringIO(given))
        with pytest.raises(SystemExit) as ended:
            main()
    said = Said(out.getvalue(), err.getvalue())
    assert (ended.value.code or 0) == code, said
    return said


class Said(NamedTuple):
    """What a command wrote."""

    stdout: str
    stderr: str


class Following:
    """A command that goes on, read as it writes."""

    def __init__(self, daemon: Daemon, words: Sequence[str], *, terminal: bool = False) -> None:
        self.said = ""
        self._read_to = 0
        self._end, other = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [*CTL, *words],
            env={**os.environ, **environment(f"http://{HOST}:{daemon.port}")},
            stdin=other if terminal else subprocess.DEVNULL,
            stdout=other,
            stderr=other,
        )
        os.close(other)

    def until(self, text: str) -> None:
        """Read until it has written this, after what was waited for before."""
        deadline = time.monotonic() + WITHIN_S
        while (at := self.said.find(text, self._read_to)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.said}"
            if select.select([self._end], [], [], 1)[0]:
                self.said += self._read()
        self._read_to = at + len(text)

    def says(self, text: str) -> bool:
        """Whether it has written this by now."""
        self._drain()
        return text in self.said

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def exit(self) -> int:
        """Its exit code, once it has ended."""
        until(lambda: self._drain() or self.process.poll() is not None, f"{self.process.args} ends", WITHIN_S)
        self._drain()
        return self.process.wait()

    def _drain(self) -> None:
        """Read what there is: a command whose output nobody reads does not end."""
        while select.select([self._end], [], [], 0)[0] and (more := self._read()):
            self.said += more

    def _read(self) -> str:
        try:
            return os.read(self._end, 65536).decode(errors="replace")
        except OSError:  # how a terminal says that nobody is at its other end
            return ""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("ctl")
    models = {"a": model(), "b": model(run="on-demand", aliases=["org/B:1"]), "gone": model(source="absent.gguf")}
    with running(folder, models, patches={"offloadd.rounds.TRIM": 0.1, "offloadd.runtime.logs.MAX_BYTES": 20_000}) as found:
        found.wait_for("a")
        yield found


def test_status_shows_all_and_fails_when_something_is_wrong(daemon: Daemon) -> None:
    said = ctl(daemon, "status", code=1).stdout
    assert " is degraded, up " in said
    assert "problem: gone failed" in said
    assert "host (RAM)" in said
    shown = json.loads(ctl(daemon, "status", "--json", code=1).stdout)
    assert shown["health"]["status"] == "degraded"
    assert [entry["id"] for entry in shown["models"]] == ["a", "b", "gone"]


def test_each_list_as_table_and_as_json(daemon: Daemon) -> None:
    for words, path, expected in (
        (("models",), "/models", "a-1 is ready"),
        (("backends",), "/backends", "llamacpp  yes"),
        (("vram",), "/vram/status", "host    a-1"),
    ):
        assert expected in ctl(daemon, *words).stdout
        assert json.loads(ctl(daemon, *words, "--json").stdout).keys() == daemon.get(path).keys()


def test_an_answer_in_a_pipe(daemon: Daemon) -> None:
    assert ctl(daemon, "chat", "a", "what", "is this?").stdout.strip()
    assert ctl(daemon, "chat", "a", "--max-tokens", "3", given="from a pipe\n").stdout.strip()
    whole = json.loads(ctl(daemon, "chat", "org/B:1", "--max-tokens", "3", "--json", "hello").stdout)
    assert whole["choices"][0]["message"]["content"]
    assert daemon.state("b") == "ready"
    assert "nothing to ask" in ctl(daemon, "chat", "a", given=" \n", code=1).stderr
    assert "refuses" in ctl(daemon, "chat", "nobody", "hello", code=1).stderr


def test_a_conversation_on_a_terminal(daemon: Daemon) -> None:
    talk = Following(daemon, ["chat", "a", "--max-tokens", "5"], terminal=True)
    try:
        talk.until(">>> ")
        talk.type("hello\n")
        talk.until("hello")
        talk.until(">>> ")
        talk.type("/nonsense\n")
        talk.until("/clear forgets")
        talk.until(">>> ")
        talk.type("\x04")
        assert talk.exit() == 0
    finally:
        talk.close()


def test_load_and_unload_by_hand(daemon: Daemon) -> None:
    assert "b is ready: " in ctl(daemon, "load", "org/B:1").stdout
    assert "b is off: " in ctl(daemon, "unload", "b").stdout
    assert json.loads(ctl(daemon, "load", "b", "--no-wait", "--json").stdout)["done"] is False
    daemon.wait_for("b")
    assert "absent.gguf" in ctl(daemon, "load", "gone", code=1).stderr
    assert "nobody" in ctl(daemon, "load", "nobody", code=1).stderr


def test_why(daemon: Daemon) -> None:
    reply = daemon.request("POST", CHAT, chat("a"), {"X-Request-Id": "asked-by-ctl"})
    assert reply.status == 200
    said = ctl(daemon, "explain", "a").stdout
    assert said.startswith("a is ready: a-1 is ready on llamacpp")
    assert "instance-ready a-1: ready after" in said
    assert "answered with 200 by a-1" in ctl(daemon, "explain", "--request", "asked-by-ctl").stdout
    assert "instance-ready" in ctl(daemon, "explain", "--instance", "a-1").stdout
    assert "absent.gguf" in ctl(daemon, "explain").stdout
    assert json.loads(ctl(daemon, "explain", "org/B:1", "--json").stdout)["model"] == "b"
    assert "no request of this id" in ctl(daemon, "explain", "--request", "nobody", code=1).stderr
    assert "give a MODEL, or" in ctl(daemon, "explain", "a", "--request", "x", code=2).stderr


def test_events_as_they_happen(daemon: Daemon) -> None:
    everything, lines = Following(daemon, ["events", "--json"]), Following(daemon, ["events", "--model", "org/B:1"])
    try:
        # Who follows is told only what comes after: ask until it has come.
        until(lambda: daemon.post("/reload", None) and everything.says("config-applied"), "it follows", WITHIN_S)
        until(
            lambda: daemon.post("/models/b/unload?wait=1", None) and daemon.chat("b") and lines.says("instance-ready"), "so does it"
        )
        assert json.loads(everything.said.splitlines()[0])["kind"]
        assert " instance-ready b-" in lines.said
        assert " a-1" not in lines.said
    finally:
        everything.close()
        lines.close()


def test_logs(daemon: Daemon) -> None:
    whole = ctl(daemon, "logs", "a").stdout
    assert whole
    assert ctl(daemon, "logs", "a-1", "--lines", "1").stdout == whole.splitlines(keepends=True)[-1]
    lines = [json.loads(line) for line in ctl(daemon, "logs", "a", "-n", "2", "--json").stdout.splitlines()]
    assert [line["line"] for line in lines] == whole.splitlines()[-2:]
    assert {line["instance"] for line in lines} == {"a-1"}
    assert "never started" in ctl(daemon, "logs", "gone", code=1).stderr
    assert "error:" in ctl(daemon, "logs", "../a-1", code=1).stderr


def test_top_once_and_as_json(daemon: Daemon) -> None:
    said = ctl(daemon, "top", "--every", "0.2").stdout
    assert re.search(r"up [\d.]+ s, config generation \d+\n", said)
    assert "host (RAM)" in said
    assert "0/2" in said
    assert json.loads(ctl(daemon, "top", "--every", "0.2", "--json").stdout).keys() >= {"health", "models", "vram"}


def test_top_on_a_terminal_until_q(daemon: Daemon) -> None:
    top = Following(daemon, ["top", "--every", "0.2"], terminal=True)
    try:
        top.until("a-1 is ready")
        top.type("q")
        assert top.exit() == 0
    finally:
        top.close()


def test_logs_follow_an_instance_over_cuts_to_its_end_and_the_model_to_its_next(tmp_path: Path) -> None:
    patches = {"offloadd.rounds.TRIM": 0.05, "offloadd.runtime.logs.MAX_BYTES": 4000, "offloadd.runtime.logs.KEPT_BYTES": 2000}
    with running(tmp_path, {"a": model()}, patches=patches) as daemon:
        first = daemon.pid()
        path = daemon.data_dir / "logs/a-1.log"
        by_instance, by_model = Following(daemon, ["logs", "a-1", "-f"]), Following(daemon, ["logs", "a", "-f"])
        try:
            for number in range(10):
                with path.open("a") as file:
                    file.write(f"line {number:03} {'x' * 80}\n" * 10)
                until(lambda: path.stat().st_size < 4000, "it is cut")
                by_instance.until(f"line {number:03}")
            assert by_instance.said.count("line 0") == 100
            os.kill(first, signal.SIGKILL)
            assert by_instance.exit() == 0
            by_model.until("a-1 has ended")
            daemon.wait_for("a")
            with (daemon.data_dir / "logs/a-2.log").open("a") as file:
                file.write("the second one\n")
            by_model.until("the second one")
        finally:
            by_instance.close()
            by_model.close()


def test_no_daemon_says_what_to_do(tmp_path: Path) -> None:
    said = ctl(f"unix:{tmp_path}/absent.sock", "models", code=1).stderr
    assert "No such file" in said
    assert "is the daemon running?" in said
    assert "no address of a daemon" in ctl("ftp://x", "models", code=2).stderr


def test_the_shell_completes_names_of_models(daemon: Daemon) -> None:
    asked = {"_OFFLOADCTL_COMPLETE": "complete_bash", "COMP_WORDS": "offloadctl chat ", "COMP_CWORD": "2"}
    env = {**os.environ, **environment(f"http://{HOST}:{daemon.port}"), **asked}
    program = Path(sys.executable).with_name("offloadctl")
    said = subprocess.run([program], env=env, capture_output=True, text=True, timeout=WITHIN_S, check=False).stdout
    assert said.split() == ["a", "b", "gone"]
