"""Servers that die, hang, lie, fork, flood or cannot be ended."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.conformance.servers import until
from tests.faults.hung_disk import hung_disk
from tests.faults.table import Outcome, Place, Skipped, answers_again, fault, is_root
from tests.integration.daemon import Daemon, alive, marks, model, running
from tests.integration.test_faults import OFTEN, QUICK, grandchildren, impostor, kill, wait_for_another

SLOW = {"STANDIN_TOKEN_S": 0.02}


def stream_error(daemon: Daemon, name: str, then: Any) -> tuple[str, float]:
    """The error that a running stream ends with when `then` happens to it, and how long that took."""
    with daemon.stream(name, 400, ignore_eos=True) as stream:
        stream.skip(3)
        since = time.monotonic()
        then()
        events = list(stream)
    assert events[-1] != "[DONE]"
    return str(events[-1]["error"]["code"]), time.monotonic() - since


@fault(1, "kill -9 of the server in mid-stream", real=True)
def killed_in_stream(place: Place) -> Outcome:
    real = place.real_one()
    with running(place.folder, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        pid = daemon.pid()
        code, took = stream_error(daemon, "a", lambda: kill(pid))
        since = time.monotonic() - took
        assert took < 5
        wait_for_another(daemon, pid)
        respawned = time.monotonic() - since
        again = answers_again(daemon, since)
        return Outcome(f"SSE error {code} after {took * 1000:.0f} ms, no [DONE]; respawned after {respawned * 1000:.0f} ms", again)


@fault(1, "kill -9 in mid-stream, a neighbour streaming beside")
def killed_beside_a_neighbour(place: Place) -> Outcome:
    with running(place.folder, {"a": model(env=SLOW), "b": model(env=SLOW)}) as daemon:
        pid, other = daemon.pid("a"), daemon.pid("b")
        with daemon.stream("b", 60) as neighbour:
            neighbour.skip(2)
            code, took = stream_error(daemon, "a", lambda: kill(pid))
            since = time.monotonic() - took
            wait_for_another(daemon, pid)
            respawned = time.monotonic() - since
            assert list(neighbour)[-1] == "[DONE]"
        assert daemon.pid("b") == other
        client = f"SSE error {code} after {took * 1000:.0f} ms, neighbour untouched; respawned after {respawned * 1000:.0f} ms"
        return Outcome(client, answers_again(daemon, since))


@fault(2, "the server dies of the request, before its first byte")
def killed_before_first_byte(place: Place) -> Outcome:
    env = {"STANDIN_CRASH_ON_REQUEST": 1, "STANDIN_MARK_FILE": place.folder / "marks"}
    with running(place.folder, {"a": model(env=env)}) as daemon:
        old = daemon.pid()
        since = time.monotonic()
        reply = daemon.chat()
        assert reply.status == 502
        sent = marks(place.folder / "marks").count("request POST /v1/chat/completions")
        assert sent == 1, "a request that kills its server is not given to the next"
        wait_for_another(daemon, old)
        daemon.wait_for("a")
        return Outcome(f"502 {reply.json()['error']['code']}, sent once", time.monotonic() - since)


@fault(3, "exit 3 at every start")
def crash_loop(place: Place) -> Outcome:
    restart = {"backoff": "9s", "max_backoff": "60s"}
    with running(place.folder, {"a": model(restart=restart, env={"STANDIN_CRASH_AT_START": 3}), "b": model()}) as daemon:
        daemon.wait_for("a", "backoff")
        begin = time.monotonic()
        reply = daemon.chat("a")
        took = time.monotonic() - begin
        assert reply.status == 503
        assert daemon.chat("b").status == 200
        since = time.monotonic()
        daemon.apply({"a": model(), "b": model()})
        client = f"503 {reply.json()['error']['code']} in {took * 1000:.0f} ms, Retry-After {reply.headers['Retry-After']}"
        return Outcome(f"{client}; well once the config is", answers_again(daemon, since))


@fault(4, "SIGSTOP: it accepts and never answers (limits of silence 1.5 s)")
def frozen(place: Place) -> Outcome:
    with running(place.folder, {"a": model(stop_timeout="500ms")}, patches=QUICK) as daemon:
        pid = daemon.pid()
        since = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        status = daemon.chat("a").status
        assert status in (200, 502)
        again = answers_again(daemon, since)
        until(lambda: not alive(pid), "the frozen one is gone")
        return Outcome(f"{status} when it was found out and replaced", again)


@fault(5, "/health and /slots answer, no token comes (canary 300 ms)")
def dead_inference(place: Place) -> Outcome:
    health = {"canary": "300ms", "canary_timeout": "500ms"}
    settings = model(stop_timeout="500ms", health=health, env={"STANDIN_DEAD_AFTER_READY": 1})
    with running(place.folder, {"a": settings}, patches=OFTEN) as daemon:
        pid = daemon.pid()
        since = time.monotonic()
        until(lambda: not alive(pid), "it is replaced")
        daemon.wait_for("a")
        kind = daemon.look()["last_exit"]["kind"]
        assert kind == "hung"
        return Outcome("nothing: found while nobody asked, and replaced", time.monotonic() - since - 1)


@fault(7, "a load of 3 s")
def slow_load(place: Place) -> Outcome:
    with running(place.folder, {"a": model(run="on-demand", env={"STANDIN_LOAD_S": 3})}) as daemon:
        since = time.monotonic()
        assert daemon.chat().status == 200
        return Outcome("200 after the load; the request waited", time.monotonic() - since)


@fault(8, "never ready (start_timeout 1 s, two tries)")
def never_ready(place: Place) -> Outcome:
    settings = {"start_timeout": "1s", "restart": {"give_up_after": 2}}
    with running(place.folder, {"a": model(**settings, env={"STANDIN_NEVER_READY": 1})}) as daemon:
        daemon.wait_for("a", "failed")
        reply = daemon.chat()
        assert reply.status == 503
        since = time.monotonic()
        daemon.apply({"a": model()})
        return Outcome(f"503 {reply.json()['error']['code']} at once; well once the config is", answers_again(daemon, since))


@fault(9, "it ignores SIGTERM (stop_timeout 1 s)")
def ignores_term(place: Place) -> Outcome:
    with running(place.folder, {"a": model(stop_timeout="1s", env={"STANDIN_IGNORE_TERM": 1}), "b": model()}) as daemon:
        pid = daemon.pid("a")
        daemon.pid("b")
        since = time.monotonic()
        daemon.apply({"b": model()})
        until(lambda: not alive(pid), "it is killed")
        took = time.monotonic() - since
        assert daemon.chat("b").status == 200
        return Outcome(f"nothing: killed after {took:.1f} s, its neighbour served on")


@fault(10, "five descendants by double fork and setsid, then kill -9 of the leader")
def scattered(place: Place) -> Outcome:
    env = {"STANDIN_FORK_GRANDCHILD": 600, "STANDIN_MARK_FILE": place.folder / "marks"}
    with running(place.folder, {"a": model(env=env)}) as daemon:
        pid = daemon.pid()
        old = grandchildren(place.folder / "marks")
        since = time.monotonic()
        kill(pid)
        until(lambda: not any(alive(each) for each in old), "nothing of it is left")
        gone = time.monotonic() - since
        return Outcome(f"nothing of the old tree after {gone * 1000:.0f} ms", answers_again(daemon, since))


@fault(11, "a descendant holds its output open, kill -9 of the leader")
def held_output(place: Place) -> Outcome:
    with running(place.folder, {"a": model(env={**SLOW, "STANDIN_FORK_GRANDCHILD": 600})}) as daemon:
        pid = daemon.pid()
        code, took = stream_error(daemon, "a", lambda: kill(pid))
        since = time.monotonic() - took
        assert took < 2
        return Outcome(f"SSE error {code} after {took * 1000:.0f} ms", answers_again(daemon, since))


@fault(12, "a process in the kernel's hands, which SIGKILL does not end")
def unkillable(place: Place) -> Outcome:
    if not is_root() or not os.path.exists("/dev/fuse"):
        raise Skipped("needs root and /dev/fuse")
    patches = {"offloadd.runtime.instances.stop.STUCK_AFTER": 0.5}
    with hung_disk(place.folder) as disk:
        settings = model(stop_timeout="500ms", env={"STANDIN_TOUCH": disk.path / "file"})
        with running(place.folder, {"a": settings, "b": model()}, patches=patches) as daemon:
            pid = daemon.pid("a")
            daemon.pid("b")
            until(disk.asked, "it hangs in the file system")
            daemon.apply({"b": model()})
            (problem,) = until(lambda: unkillable_ones(daemon), "it is told")
            assert "stay reserved" in problem
            held = [i["instance"] for d in daemon.get("/vram/status")["devices"] for i in d["instances"]]
            assert "a-1" in held
            assert daemon.chat("b").status == 200
            since = time.monotonic()
            disk.let_go()
            until(lambda: not alive(pid), "it ends when the kernel lets go")
            until(lambda: not unkillable_ones(daemon), "and that is seen")
            return Outcome("others served on; /health says so, its memory stays on the books", time.monotonic() - since)


def unkillable_ones(daemon: Daemon) -> list[str]:
    return [problem["what"] for problem in daemon.get("/health")["problems"] if "SIGKILL" in problem["what"]]


@fault(34, "an impostor takes the server's port before it does")
def port_taken(place: Place) -> Outcome:
    with running(place.folder, {"a": model(env={"STANDIN_BIND_LATE_S": 0.7})}) as daemon:
        port = until(lambda: (found := daemon.look()["instances"]) and found[0]["port"], "its port is chosen")
        since = time.monotonic()
        with impostor(port) as asked:
            again = answers_again(daemon, since)
            assert not asked
        assert daemon.look()["last_exit"]["kind"] == "port-taken"
        return Outcome("200 from the next start on another port; the impostor was sent nothing", again)


@fault(44, "out of device memory while loading")
def out_of_memory(place: Place) -> Outcome:
    settings = model(restart={"give_up_after": 2}, env={"STANDIN_CRASH_WHILE_LOADING": "oom"})
    with running(place.folder, {"a": settings}) as daemon:
        found = daemon.wait_for("a", "failed")
        assert found["last_exit"]["kind"] == "out-of-memory"
        reply = daemon.chat()
        assert reply.status == 503
        since = time.monotonic()
        daemon.apply({"a": model()})
        return Outcome("503 that names memory and what to lower; well once the config is", answers_again(daemon, since))


@fault(0, "it grows beyond its ceiling of RAM (health.rss_limit)")
def grows(place: Place) -> Outcome:
    settings = model(health={"rss_limit": "100MiB"}, env={"STANDIN_ALLOC_MIB": 150})
    with running(place.folder, {"a": settings}, patches={"offloadd.plan.upkeep.WORN_AFTER": 1.0}) as daemon:
        pid = daemon.pid()
        statuses: list[int] = []

        def replaced() -> bool:
            statuses.append(daemon.chat("a", 2).status)
            return not alive(pid)

        until(replaced, "it is replaced", 30)
        assert set(statuses) == {200}
        return Outcome(f"{len(statuses)} requests meanwhile, all 200")


@fault(49, "the client leaves in mid-stream")
def client_leaves(place: Place) -> Outcome:
    env = {**SLOW, "STANDIN_MARK_FILE": place.folder / "marks"}
    with running(place.folder, {"a": model(env=env)}) as daemon:
        daemon.pid()
        stream = daemon.stream("a", 400)
        stream.skip(3)
        since = time.monotonic()
        stream.leave()
        until(lambda: any(line.startswith("cancelled") for line in marks(place.folder / "marks")), "the work ends")
        until(lambda: daemon.load() == 0, "its slot is free")
        return Outcome("left; the server stopped computing, the slot is free", time.monotonic() - since)


@fault(53, "more requests than the queue takes")
def queue_full(place: Place) -> Outcome:
    with running(place.folder, {"a": model(parallel=1, queue={"max_waiting": 2}, env=SLOW)}) as daemon:
        daemon.pid()
        asked = [daemon.chat_soon("a", 20) for _ in range(8)]
        found = [one.result() for one in asked]
        refused = [reply for reply in found if reply.status == 429]
        assert refused
        assert all(reply.headers["Retry-After"] for reply in refused)
        assert {reply.status for reply in found} == {200, 429}
        return Outcome(f"{8 - len(refused)} answered, {len(refused)} refused at once with 429 and Retry-After")


@fault(54, "60 requests at once for a model that is not loaded")
def herd(place: Place) -> Outcome:
    env = {"STANDIN_LOAD_S": 0.5, "STANDIN_MARK_FILE": place.folder / "marks"}
    with running(place.folder, {"a": model(run="on-demand", parallel=4, env=env)}) as daemon:
        since = time.monotonic()
        asked = [daemon.chat_soon("a", 1) for _ in range(60)]
        assert {one.result().status for one in asked} == {200}
        assert marks(place.folder / "marks").count("start") == 1
        return Outcome("all 200, from one start", time.monotonic() - since)


@fault(56, "2 MB of log a second")
def log_flood(place: Place) -> Outcome:
    limits = {"offloadd.runtime.logs.MAX_BYTES": 300_000, "offloadd.runtime.logs.KEPT_BYTES": 100_000, "offloadd.rounds.TRIM": 0.05}
    with running(place.folder, {"a": model(env={"STANDIN_LOG_FLOOD": 2_000_000})}, patches=limits) as daemon:
        daemon.pid()
        kept = daemon.data_dir / "logs/a-1.log.1"
        until(kept.exists, "the log is cut")
        assert daemon.chat().status == 200
        assert sum(path.stat().st_size for path in daemon.data_dir.glob("logs/*")) < 4_000_000
        return Outcome("200; the log stays bounded")
