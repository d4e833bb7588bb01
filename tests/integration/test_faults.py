"""Backends that die, hang, lie or refuse to go, and model files that are not there or not whole."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conformance.servers import HOST, tiny_gguf, until
from tests.integration.daemon import Daemon, alive, elapsed, marks, model, running

SLOW_TOKENS = {"STANDIN_TOKEN_S": 0.02}


def kill(pid: int) -> float:
    """kill -9, and when that was."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def wait_for_another(daemon: Daemon, old: int, name: str = "a", within_s: float = 5) -> int:
    """The pid of the process that takes the place of `old`."""

    def another() -> int | None:
        return next((pid for pid in daemon.pids(name) if pid != old), None)

    return int(until(another, "a new process", within_s))


# --- killed ---------------------------------------------------------------------------------------------------------------------


def test_killed_in_mid_stream(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW_TOKENS), "b": model(env=SLOW_TOKENS)}) as daemon:
        old, other = daemon.pid("a"), daemon.pid("b")
        with daemon.stream("a") as stream, daemon.stream("b", 60) as neighbour:
            stream.skip(5)
            killed = kill(old)
            rest = list(stream)
            assert time.monotonic() - killed < 0.3
            wait_for_another(daemon, old)
            assert time.monotonic() - killed < 1
            assert list(neighbour)[-1] == "[DONE]"
        assert stream.status == 200
        error = rest[-1]["error"]
        assert (error["type"], error["code"]) == ("server_error", "backend_lost")
        assert "a-1 (llamacpp) was lost: the backend ended (killed by SIGKILL)" in error["message"]
        assert "[DONE]" not in rest
        assert daemon.chat("a").status == 200
        assert daemon.look("a")["last_exit"]["kind"] == "killed"
        assert daemon.pid("b") == other


def test_killed_in_mid_answer_that_is_no_stream(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW_TOKENS)}) as daemon:
        pid = daemon.pid()
        asked = daemon.chat_soon("a", 500)
        until(lambda: daemon.load() == 1, "it runs")
        killed = kill(pid)
        reply = asked.result()
        assert time.monotonic() - killed < 0.5
        assert reply.status == 502
        assert reply.json()["error"]["code"] == "backend_lost"
        assert int(reply.headers["Retry-After"]) >= 1
        assert reply.headers["X-Request-Id"]


def test_killed_during_a_request_that_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """With n: 2 the answer cannot be put together from a stream."""
    with running(tmp_path, {"a": model(env=SLOW_TOKENS)}) as daemon:
        pid = daemon.pid()
        asked = daemon.chat_soon("a", 500, n=2)
        until(lambda: daemon.load() == 1, "it runs")
        kill(pid)
        assert asked.result().status == 502


def test_killed_by_a_request_that_arrives(tmp_path: Path) -> None:
    """Before its first byte the error is the answer, and the request is not sent to a second victim."""
    mark = tmp_path / "mark"
    with running(tmp_path, {"a": model(env={"STANDIN_CRASH_ON_REQUEST": 1, "STANDIN_MARK_FILE": mark})}) as daemon:
        daemon.pid()
        with daemon.stream("a") as stream:
            assert stream.status == 502
            assert stream.response.read().startswith(b'{"error": {"message": "the backend a-1 (llamacpp) was lost')
        assert marks(mark).count("request POST /v1/chat/completions") == 1


def test_killed_while_loading(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(run="on-demand", env={"STANDIN_LOAD_S": 0.5})}) as daemon:
        asked = [daemon.chat_soon("a"), daemon.chat_soon("a")]
        old = daemon.wait_for("a", "loading")["instances"][0]["pid"]
        killed = kill(old)
        wait_for_another(daemon, old)
        assert time.monotonic() - killed < 1
        assert [one.result().status for one in asked] == [200, 200]
        assert daemon.launches() == 2


def test_an_abort_of_its_own(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env={"STANDIN_CRASH_AFTER_TOKENS": 7})}) as daemon:
        daemon.pid()
        with daemon.stream("a") as stream:
            assert list(stream)[-1]["error"]["code"] == "backend_lost"
        found = until(lambda: daemon.look()["last_exit"], "its end is on record")
        assert found["status"] == "killed by SIGABRT"
        assert "illegal memory access" in found["message"]


def test_a_request_that_kills_every_engine_is_refused_and_others_are_served(tmp_path: Path) -> None:
    restart = {"backoff": "10ms", "max_backoff": "10ms"}
    with running(tmp_path, {"a": model(restart=restart, env={"STANDIN_CRASH_ON_TEXT": "poison"})}) as daemon:
        asked = [{"role": "user", "content": "poison"}]
        answers = [daemon.chat(messages=asked) for _ in range(4)]
        assert [reply.status for reply in answers] == [502, 502, 502, 429]
        assert answers[3].json()["error"]["code"] == "request_kills_backend"
        assert int(answers[3].headers["Retry-After"]) > 500
        assert daemon.chat().status == 200
        assert daemon.launches() == 4


# --- failing at the start -------------------------------------------------------------------------------------------------------


def test_a_crash_loop_backs_off_and_refuses_fast(tmp_path: Path) -> None:
    restart = {"backoff": "9s", "max_backoff": "60s"}
    with running(tmp_path, {"a": model(restart=restart, env={"STANDIN_CRASH_AT_START": 3})}) as daemon:
        found = daemon.wait_for("a", "backoff")
        assert "exit code 3" in found["reason"]
        assert found["retry_at"] > time.time() + 5
        reply = daemon.chat()
        assert reply.status == 503
        assert reply.json()["error"]["code"] == "model_backing_off"
        assert 5 <= int(reply.headers["Retry-After"]) <= 12
        assert elapsed(daemon.chat) < 0.5
        assert daemon.launches() == 2
        assert any("a backoff" in problem["what"] for problem in daemon.get("/health")["problems"])


def test_a_short_backoff_is_waited_out(tmp_path: Path) -> None:
    """What ends the loop is a file that changes: then the failures before it no longer count."""
    restart = {"backoff": "300ms", "max_backoff": "300ms"}
    with running(tmp_path, {"a": model(restart=restart, env={"STANDIN_CRASH_AT_START": 3})}) as daemon:
        daemon.wait_for("a", "backoff")
        asked = daemon.chat_soon()
        until(lambda: daemon.look()["waiting"] == 1, "it waits")
        daemon.apply({"a": model(restart=restart)})
        assert asked.result().status == 200


def test_a_model_that_keeps_failing_is_given_up(tmp_path: Path) -> None:
    restart = {"backoff": "20ms", "max_backoff": "40ms", "give_up_after": 4}
    with running(tmp_path, {"a": model(restart=restart, env={"STANDIN_CRASH_WHILE_LOADING": "oom"})}) as daemon:
        found = daemon.wait_for("a", "failed")
        assert "not enough memory" in found["reason"]
        assert "given up after 4 failures" in found["reason"]
        assert "lower context" in found["hint"]
        reply = daemon.chat()
        assert reply.status == 503
        assert "Retry-After" not in reply.headers
        assert daemon.launches() == 4
        daemon.apply({"a": model()})
        daemon.wait_for("a")


def test_a_missing_file_is_never_started_and_found_when_it_comes(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(source="late.gguf")}) as daemon:
        found = daemon.wait_for("a", "failed")
        assert f"late.gguf does not exist (looked for {tmp_path}/late.gguf)" in found["reason"]
        assert found["hint"]
        reply = daemon.chat()
        assert reply.status == 503
        assert "does not exist" in reply.json()["error"]["message"]
        assert daemon.launches() == 0
        (tmp_path / "late.gguf").write_bytes(tiny_gguf())
        daemon.wait_for("a", within_s=5)


def test_a_truncated_file_is_started_once_and_again_when_it_changes(tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_gguf()[:-1000])
    with running(tmp_path, {"a": model(source="half.gguf"), "b": model()}) as daemon:
        found = daemon.wait_for("a", "failed")
        assert "truncated" in found["reason"]
        assert "copy or download the file again" in found["hint"]
        assert found["last_exit"]["kind"] == "bad-model"
        assert daemon.chat().status == 503
        daemon.wait_for("b")
        assert daemon.launches() == 1
        half.write_bytes(tiny_gguf())
        daemon.wait_for("a", within_s=6)
        assert daemon.launches() == 2


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}, llamacpp={"command": ["/nowhere/llama-server"]}) as daemon:
        found = daemon.wait_for("a", "failed")
        assert "/nowhere/llama-server is not on PATH" in found["reason"]
        (engine,) = [b for b in daemon.get("/backends")["backends"] if b["name"] == "llamacpp"]
        assert not engine["available"]


def test_an_option_that_the_engine_refuses(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(args=["--frobnicate"])}) as daemon:
        assert "does not know the option --frobnicate" in daemon.wait_for("a", "failed")["reason"]
        assert daemon.launches() == 1


# --- never ready ----------------------------------------------------------------------------------------------------------------


def test_never_ready_ends_by_start_timeout(tmp_path: Path) -> None:
    settings = {"start_timeout": "1s", "restart": {"give_up_after": 2}}
    models = {
        "loading": model(**settings, env={"STANDIN_NEVER_READY": 1}),
        "silent": model(**settings, env={"STANDIN_HANG_ALL": 1}),
        "elsewhere": model(**settings, env={"STANDIN_WRONG_PORT": 0}),
    }
    with running(tmp_path, models) as daemon:
        for name in models:
            found = daemon.wait_for(name, "failed")
            assert found["last_exit"]["kind"] == "start-timeout", found
            assert "start_timeout" in found["reason"]
            assert daemon.launches(name) == 2
            assert f"{name}: ready" not in daemon.log


def test_a_port_taken_in_the_last_moment(tmp_path: Path) -> None:
    """An impostor holds the port: it is not taken for ours, is sent nothing, and the next start gets another port."""
    with running(tmp_path, {"a": model(env={"STANDIN_BIND_LATE_S": 0.7})}) as daemon:
        port = until(lambda: (found := daemon.look()["instances"]) and found[0]["port"], "its port is chosen")
        with impostor(port) as asked:
            found = daemon.wait_for("a")
            assert found["instances"][0]["port"] != port
            assert found["last_exit"]["kind"] == "port-taken"
            assert daemon.launches() == 2
            assert not asked


@contextlib.contextmanager
def impostor(port: int) -> Iterator[list[bytes]]:
    """Listens on a port and says 200 to everybody; yields what it was asked."""
    asked: list[bytes] = []
    with socket.create_server((HOST, port)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        asked.append(client.recv(4096))
                        client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}')

        thread = threading.Thread(target=answer)
        thread.start()
        yield asked
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# --- hard to end ----------------------------------------------------------------------------------------------------------------


def test_ignoring_sigterm_ends_in_sigkill_at_stop_timeout(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(stop_timeout="1s", env={"STANDIN_IGNORE_TERM": 1})}) as daemon:
        pid = daemon.pid()
        start = time.monotonic()
        daemon.apply({})
        until(lambda: not alive(pid), "it ends")
        assert 0.9 < time.monotonic() - start < 2.5
        assert "a-1 did not end within 1 s of SIGTERM (stop_timeout)" in daemon.log


def test_what_has_left_the_group_ends_too(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with running(tmp_path, {"a": model(env={"STANDIN_FORK_GRANDCHILD": 600, "STANDIN_MARK_FILE": mark})}) as daemon:
        first = daemon.pid()
        (grandchild,) = grandchildren(mark)
        assert alive(grandchild)
        assert os.getsid(grandchild) != os.getsid(first)
        kill(first)
        until(lambda: not alive(grandchild), "it is killed with a leader that died")
        wait_for_another(daemon, first)
        daemon.wait_for("a")
        second = grandchildren(mark)[-1]
        assert alive(second)
        daemon.apply({})
        until(lambda: not alive(second), "it is killed with a leader that was stopped")


def grandchildren(mark: Path) -> list[int]:
    return [int(line.split()[0]) for line in mark.read_text().splitlines() if line.endswith(" grandchild")]


def test_a_backend_that_is_stopped_by_hand_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as daemon:
        pid = daemon.pid()
        os.kill(pid, signal.SIGTERM)
        wait_for_another(daemon, pid)


# --- hung -----------------------------------------------------------------------------------------------------------------------

QUICK = {
    "offloadd.plan.upkeep.IDLE_SILENCE": 1.5,
    "offloadd.plan.upkeep.BUSY_SILENCE": 2.5,
    "offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.2,
}
"""The limits of silence, shortened: half a minute and five minutes in the product."""


def test_a_healthy_liar_is_found_out_and_a_quiet_one_left_alone(tmp_path: Path) -> None:
    models = {"liar": model(stop_timeout="1s", env={"STANDIN_HANG_AFTER_READY": 0.5}), "quiet": model()}
    with running(tmp_path, models, patches=QUICK) as daemon:
        quiet = daemon.pid("quiet")
        found = until(lambda: daemon.look("liar")["last_exit"], "it is stopped")
        assert found["kind"] == "hung"
        assert "no sign of life for" in found["message"]
        assert daemon.pid("quiet") == quiet


def test_a_hung_backend_with_a_request(tmp_path: Path) -> None:
    env = {"STANDIN_HANG_AFTER_READY": 0.5, "STANDIN_TOKEN_S": 0.02}
    with running(tmp_path, {"a": model(stop_timeout="1s", env=env)}, patches=QUICK) as daemon:
        daemon.pid()
        with daemon.stream("a") as stream:
            error = list(stream)[-1]["error"]
        assert error["code"] == "backend_lost"
        assert "no sign of life" in error["message"]


def test_a_frozen_process_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(stop_timeout="500ms")}, patches=QUICK) as daemon:
        pid = daemon.pid()
        os.kill(pid, signal.SIGSTOP)
        wait_for_another(daemon, pid, within_s=15)
        until(lambda: not alive(pid), "the frozen one is gone")


# --- noisy ----------------------------------------------------------------------------------------------------------------------


def test_a_flood_of_log_is_bounded(tmp_path: Path) -> None:
    limits = {"offloadd.runtime.logs.MAX_BYTES": 300_000, "offloadd.runtime.logs.KEPT_BYTES": 100_000, "offloadd.rounds.TRIM": 0.05}
    with running(tmp_path, {"a": model(env={"STANDIN_LOG_FLOOD": 2_000_000})}, patches=limits) as daemon:
        daemon.pid()
        kept, current = daemon.data_dir / "logs/a-1.log.1", daemon.data_dir / "logs/a-1.log"
        first = until(lambda: kept.exists() and kept.stat().st_mtime_ns, "the log is cut")
        until(lambda: kept.stat().st_mtime_ns != first, "and cut again")
        assert kept.stat().st_size <= 100_000
        assert current.stat().st_size < 3_000_000
        assert psutil.Process(daemon.process.pid).memory_info().rss < 300 * 2**20
        assert daemon.chat().status == 200


# --- sick -----------------------------------------------------------------------------------------------------------------------

OFTEN = {"offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.2}


def test_dead_inference_behind_good_health_is_found_by_a_canary(tmp_path: Path) -> None:
    health = {"canary": "300ms", "canary_timeout": "500ms"}
    models = {
        "dead": model(stop_timeout="500ms", health=health, env={"STANDIN_DEAD_AFTER_READY": 1}),
        "well": model(health=health, env={"STANDIN_MARK_FILE": tmp_path / "well"}),
    }
    with running(tmp_path, models, patches=OFTEN) as daemon:
        well, dead = daemon.pid("well"), daemon.pid("dead")
        found = until(lambda: daemon.look("dead")["last_exit"], "it is stopped")
        assert found["kind"] == "hung"
        assert "gives no token" in found["message"]
        until(lambda: not alive(dead), "the dead one is gone")
        until(lambda: marks(tmp_path / "well").count("request POST /completion") >= 2, "the other one is asked too")
        assert daemon.pid("well") == well


def test_a_canary_does_not_disturb_work(tmp_path: Path) -> None:
    env = {"STANDIN_TOKEN_S": 0.02, "STANDIN_MARK_FILE": tmp_path / "marks"}
    with running(tmp_path, {"a": model(health={"canary": "500ms"}, env=env)}, patches=OFTEN) as daemon:
        daemon.pid()
        with daemon.stream("a", 100) as stream:
            assert list(stream)[-1] == "[DONE]"
        until(lambda: "completed stream 100" in marks(tmp_path / "marks"), "the server has taken note of its end")
        seen = marks(tmp_path / "marks")
        begin, end = seen.index("request POST /v1/chat/completions"), seen.index("completed stream 100")
        assert "request POST /completion" not in seen[begin:end], "none while a request ran"


def test_a_silent_replica_is_passed_over_before_it_is_replaced(tmp_path: Path) -> None:
    patches = {**OFTEN, "offloadd.runtime.instances.checks.IDLE_ANSWER": 0.3, "offloadd.runtime.instances.checks.DOUBT_EVERY": 0.1}
    with running(tmp_path, {"a": model(replicas=2, parallel=4, stop_timeout="500ms")}, patches=patches) as daemon:
        until(lambda: [i["state"] for i in daemon.look()["instances"]] == ["ready", "ready"], "both are ready")
        frozen, other = (i["instance"] for i in daemon.look()["instances"])
        pid = next(i["pid"] for i in daemon.look()["instances"] if i["instance"] == frozen)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: next(i for i in daemon.look()["instances"] if i["instance"] == frozen).get("ejected"), "it is passed over")
        assert {daemon.chat("a", 1).headers["X-Offloadd-Instance"] for _ in range(8)} == {other}
        os.kill(pid, signal.SIGCONT)
        until(lambda: not any(i.get("ejected") for i in daemon.look()["instances"]), "it is trusted again")
        assert pid in daemon.pids()


def test_one_that_grows_beyond_its_ceiling_is_replaced_without_a_failed_request(tmp_path: Path) -> None:
    settings = model(health={"rss_limit": "100MiB"}, env={"STANDIN_ALLOC_MIB": 150})
    with running(tmp_path, {"a": settings}, patches={"offloadd.plan.upkeep.WORN_AFTER": 1.0}) as daemon:
        pid = daemon.pid()
        statuses = []

        def replaced() -> bool:
            statuses.append(daemon.chat("a", 2).status)
            return not alive(pid)

        until(replaced, "it is replaced", 30)
        assert set(statuses) == {200}
        assert "its ceiling is 100 MiB (health.rss_limit)" in daemon.log
