"""Each knob of the stand-in does what its help says, so that tests built on it break what they mean to break."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from offloadd.backends.llamacpp import BACKEND
from offloadd.state.launch import ExitKind, ExitStatus
from tests.conformance.backend import CHAT, ENDLESS, HELLO
from tests.conformance.servers import HOST, Server, Subject, standin, until


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return standin(tmp_path)


def silent(server: Server, path: str) -> bool:
    """Whether a request gets no byte within a moment, though the connection stands."""
    with contextlib.closing(server.connect(0.3)) as connection:
        connection.request("GET", path)
        try:
            connection.getresponse()
        except TimeoutError:
            return True
        return False


def marks(path: Path) -> list[str]:
    """The mark file's lines without their pids."""
    return [line.split(" ", 1)[1] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "expected"), [("3", ExitStatus(code=3)), ("-11", ExitStatus(signal=11)), ("oom", ExitStatus(code=1))]
)
@pytest.mark.parametrize("when", ["STANDIN_CRASH_AT_START", "STANDIN_CRASH_WHILE_LOADING"])
def test_crash_before_ready(subject: Subject, when: str, how: str, expected: ExitStatus) -> None:
    with subject.start(env={when: how}) as server:
        assert server.exit() == expected
        if how == "oom":
            assert BACKEND.explain_exit(expected, server.log, was_ready=False).kind is ExitKind.OUT_OF_MEMORY


def test_crash_after_tokens_cuts_the_stream(subject: Subject) -> None:
    with subject.start(env={"STANDIN_CRASH_AFTER_TOKENS": "4"}) as server:
        server.wait_ready()
        with pytest.raises(http.client.IncompleteRead):
            server.post(CHAT, {"messages": HELLO, "max_tokens": 9, "stream": True})
        assert server.exit() == ExitStatus(signal=6)


def test_crash_on_request(subject: Subject) -> None:
    with subject.start(env={"STANDIN_CRASH_ON_REQUEST": "2"}) as server:
        server.wait_ready()
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status == 200
        with pytest.raises(ConnectionError):
            server.post(CHAT, {"messages": HELLO, "max_tokens": 1})
        assert server.exit() == ExitStatus(signal=11)


def test_ignore_term(subject: Subject) -> None:
    with subject.start(env={"STANDIN_IGNORE_TERM": "1"}) as server:
        server.wait_ready()
        for number in (signal.SIGTERM, signal.SIGINT):
            server.process.send_signal(number)
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status == 200
        server.process.kill()
        assert server.exit() == ExitStatus(signal=9)


def test_healthy_liar(subject: Subject) -> None:
    with subject.start(env={"STANDIN_HANG_AFTER_READY": "0"}) as server:
        server.wait_ready()
        assert server.get("/v1/models").status == 200
        assert silent(server, "/slots")
        assert silent(server, "/metrics")
        with contextlib.closing(server.begin(CHAT, ENDLESS)):
            server.term()
            until(lambda: not server.listening, "the first SIGTERM is heard")
            server.term()
            assert server.exit() == ExitStatus(code=1)


def test_hang_all(subject: Subject) -> None:
    with subject.start(env={"STANDIN_HANG_ALL": "1"}) as server:
        server.wait_listening()
        assert silent(server, "/health")


def test_never_ready(subject: Subject) -> None:
    with subject.start(env={"STANDIN_NEVER_READY": "1"}) as server:
        server.wait_listening()
        assert server.get("/health").status == 503


def test_late_bind_and_wrong_port(subject: Subject) -> None:
    with subject.start(env={"STANDIN_BIND_LATE_S": "0.3"}) as server:
        assert not server.listening
        server.wait_ready()
    with subject.start(env={"STANDIN_WRONG_PORT": "0"}) as server:
        line = until(lambda: next((line for line in server.log if "listening on" in line), None), "it listens")
        assert not server.listening
        with socket.create_connection((HOST, int(line.rsplit(":", 1)[1]))):
            pass


def test_grandchild_outlives_its_server(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "marks"
    with subject.start(env={"STANDIN_FORK_GRANDCHILD": "60", "STANDIN_MARK_FILE": str(path)}) as server:
        server.wait_ready()
        line = until(lambda: next((line for line in path.read_text().splitlines() if "grandchild" in line), None), "it is marked")
        grandchild = psutil.Process(int(line.split()[0]))
        assert os.getsid(grandchild.pid) != os.getsid(server.process.pid)
        server.term()
        assert server.exit() == ExitStatus(code=0)
        assert grandchild.is_running()
        grandchild.kill()


def test_log_flood_and_memory(subject: Subject) -> None:
    with subject.start(env={"STANDIN_LOG_FLOOD": "1000000", "STANDIN_ALLOC_MIB": "64"}) as server:
        server.wait_ready()
        until(lambda: server.log_path.stat().st_size > 100_000, "the log grows")
        assert psutil.Process(server.process.pid).memory_info().rss > 64 * 2**20


def test_marks_count_requests_and_tokens(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "marks"
    with subject.start(env={"STANDIN_MARK_FILE": str(path)}) as server:
        server.wait_ready()
        server.post(CHAT, {"messages": HELLO, "max_tokens": 3})
        server.post(CHAT, {"messages": HELLO, "stream": True})
        client = server.begin(CHAT, {**ENDLESS, "stream": True})
        assert client.getresponse().status == 200
        client.close()
        until(lambda: any("cancelled stream" in line for line in marks(path)), "the cancelled stream is marked")
        server.term()
        assert server.exit() == ExitStatus(code=0)
    found = [line for line in marks(path) if line != "request GET /health"]
    asked = f"request POST {CHAT}"
    assert found[:7] == ["start", "ready", asked, "completed plain 3", asked, "completed stream 16", asked]
    assert found[-1] == "term"


def test_sigterm_cuts_a_stream_at_the_next_ping(subject: Subject) -> None:
    with subject.start(spec=subject.spec(args=("--sse-ping-interval", "1"))) as server:
        server.wait_ready()
        with contextlib.closing(server.begin(CHAT, {**ENDLESS, "stream": True})) as client:
            response = client.getresponse()
            response.readline()
            server.term()
            lines = [line for line in iter(response.readline, b"") if line.strip()]
            assert lines[-1] == b":\n"
            assert b"data: [DONE]\n" not in lines
        assert server.exit() == ExitStatus(code=0)
