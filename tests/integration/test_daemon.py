"""The daemon as a process: how it ends, dies, comes back, and what it does not start beside."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

from tests.conformance.servers import HOST, until
from tests.integration.daemon import again, launch, marks, model, running, wait_healthy

SLOW = {"STANDIN_TOKEN_S": 0.02}


def test_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with running(tmp_path, {"a": model(env={**SLOW, "STANDIN_MARK_FILE": mark}), "b": model()}) as daemon:
        daemon.wait_for("b")
        daemon.pid()
        with daemon.stream("a", 50) as stream:
            stream.skip(3)
            daemon.term()
            until(lambda: "stopping: no new requests" in daemon.log, "it drains")
            refused = daemon.chat()
            assert refused.status == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["Retry-After"]
            assert daemon.request("GET", "/health").status == 200
            daemon.hup()
            assert list(stream)[-1] == "[DONE]"
        assert daemon.exit() == 0
        assert not daemon.leftovers()
        assert "completed stream 50" in marks(mark)
        assert "stopped: no process is left" in daemon.log


def test_a_second_sigterm_hurries(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW)}) as daemon:
        daemon.pid()
        with daemon.stream("a", 5000) as stream:
            stream.skip(3)
            daemon.term()
            until(lambda: "stopping: no new requests" in daemon.log, "it drains")
            start = time.monotonic()
            daemon.term()
            rest = list(stream)
            assert rest[-1]["error"]["code"] == "backend_lost"
            assert "offloadd is shutting down" in rest[-1]["error"]["message"]
        assert daemon.exit() == 0
        assert time.monotonic() - start < 5


def test_sigint_ends_it_as_well_and_refuses_those_who_wait(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env={"STANDIN_LOAD_S": 600})}) as daemon:
        asked = daemon.chat_soon()
        until(lambda: daemon.look()["waiting"] == 1, "it waits")
        daemon.signal(signal.SIGINT)
        assert asked.result().status == 503
        assert daemon.exit() == 0


def test_sigterm_while_nothing_is_ready_yet(tmp_path: Path) -> None:
    with running(tmp_path, {name: model(env={"STANDIN_BIND_LATE_S": 600}) for name in ("a", "b")}) as daemon:
        until(lambda: daemon.pids("a") and daemon.pids("b"), "both start")
        daemon.term()
        assert daemon.exit(10) == 0


def test_a_second_daemon_on_the_same_data_folder_gives_way(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as daemon:
        pid = daemon.pid()
        second = again(tmp_path, daemon.config_path, daemon.base)
        assert second.exit() == 1
        assert f"another offloadd (pid {daemon.process.pid}) uses the data folder {daemon.data_dir}" in second.log
        assert daemon.pid() == pid


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    daemon = launch(tmp_path, {"a": model()})
    with socket.socket() as holder:
        holder.bind((HOST, daemon.port))
        holder.listen()
        try:
            assert daemon.exit() == 1
            assert f"cannot listen on {HOST}:{daemon.port}: " in daemon.log
            assert f"ss -ltnp 'sport = :{daemon.port}'" in daemon.log
            assert not daemon.leftovers()
        finally:
            daemon.discard()


def test_a_bad_config_ends_the_start_with_all_that_is_wrong(tmp_path: Path) -> None:
    daemon = launch(tmp_path, {"a": model(run="sometimes"), "b": model(context="many")})
    try:
        assert daemon.exit() == 1
        assert "models.a.run" in daemon.log or "sometimes" in daemon.log
        assert "context" in daemon.log
        assert "Traceback" not in daemon.log
    finally:
        daemon.discard()


def test_sighup_before_it_is_ready_does_not_end_it(tmp_path: Path) -> None:
    daemon = launch(tmp_path, {"a": model()})

    def ignores_or_handles_sighup() -> bool:
        text = Path(f"/proc/{daemon.process.pid}/status").read_text()
        masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigIgn", "SigCgt"))]
        return any(mask & 1 for mask in masks)

    try:
        until(ignores_or_handles_sighup, "it has taken care")
        for _ in range(200):
            daemon.hup()
            time.sleep(0.002)
        wait_healthy(daemon).wait_for("a")
        daemon.close()
    finally:
        daemon.discard()


def test_sigterm_during_the_start(tmp_path: Path) -> None:
    """Told to end in the moment in which it listens, it ends well."""
    daemon = launch(tmp_path, {"a": model(), "b": model()})
    try:
        until(lambda: "listening on" in daemon.log, "it listens")
        daemon.term()
        assert daemon.exit() == 0
        assert not daemon.leftovers()
        assert "Traceback" not in daemon.log
    finally:
        daemon.discard()
