"""The stand-in for vLLM held to recordings of the real one: the same requests, answers of the same shape, and the same life."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conformance import recordings
from tests.conformance.processes import Program, Server, free_port, session, standin, until, wait_serving
from tests.conformance.shared import shared

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello world"}]
ASKED = {"model": "tiny", "messages": HELLO, "max_tokens": 4}
KEYS = {"Authorization": "Bearer sk-test-2"}
PLAIN = """
    chat-completion.json chat-completion-max-completion-tokens.json chat-completion-max-tokens-1.json
    chat-completion-max-tokens-1-stream.sse chat-completion-no-max-tokens.json
    chat-completion-stream.sse chat-completion-stream-usage.sse chat-completion-n2.json
    completion.json completion-stream.sse completion-stream-usage.sse completion-two-prompts.json content-parts.json
    no-model-field.json accepted-unknown-param.json v1-models.json health-ready.txt ping.txt version.json load-idle.json
    error-empty-body.json error-form-content-type.json error-json-array.json error-logprobs-top-without.json
    error-malformed-json.json error-max-tokens-0.json error-max-tokens-negative.json error-max-tokens-over-context.json
    error-max-tokens-string.json error-messages-empty.json error-messages-not-list.json error-missing-messages.json
    error-missing-prompt.json error-n-0.json error-temperature-99.json error-temperature-negative.json error-top-p-5.json
    error-unknown-model.json error-unknown-model-stream.json error-unknown-path-post.json error-unknown-path.json
    error-wrong-content-type.json error-wrong-method-get-chat.json error-wrong-method-post-models.json
    error-wrong-method-put.json no-content-type.json embeddings-not-supported.json head-health.json slots.json props.json
    models.json root.json double-slash.json tokenize.json tokenize-unknown-model.json detokenize.json is-sleeping-not-dev.json
"""
KEYED = """
    apikey-missing-chat.json apikey-ok-chat.json apikey-wrong-chat.json apikey-lowercase-bearer-chat.json
    apikey-x-api-key-chat.json apikey-missing-get-health.txt apikey-missing-get-nope.json apikey-missing-get-v1-models.json
    apikey-missing-get-v1-nope.json apikey-missing-get-version.json apikey-missing-get-ping.txt
    apikey-missing-tokenize-post.json apikey-missing-invocations-post.json
"""
DEV = """
    dev-is-sleeping.json dev-sleep-level1.json dev-is-sleeping-while-asleep.json dev-health-while-asleep.txt
    dev-sleep-again.json dev-wake-up.json dev-wake-up-when-awake.json dev-chat-after-wake.json dev-sleep-level2.json
    dev-sleep-level9.json dev-sleep-get-method.json
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """A way the server was run when these captures were taken."""

    captures: str
    args: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


SETTINGS = {
    "plain": Setting(PLAIN),
    "keyed": Setting(KEYED, "--api-key sk-test-1 sk-test-2 --max-num-queued-reqs 3 --max-num-seqs 2"),
    "dev": Setting(DEV, env={"VLLM_SERVER_DEV_MODE": "1"}),
}
CASES = [(name, capture) for name, setting in SETTINGS.items() for capture in setting.captures.split()]


@contextlib.contextmanager
def running(folder: Path, *flags: str, program: Program | None = None, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    port = free_port()
    model = folder / "tinyhf"
    model.mkdir(exist_ok=True)
    given = ["serve", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    given += ["--enforce-eager", "--max-model-len", "256", *flags]
    with (program or standin("vllm_server")).run(given, folder, port, env) as server:
        yield server


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """One stand-in per setting, started when its first capture is played."""
    folder = tmp_path_factory.mktemp("vllm")
    with contextlib.ExitStack() as stack:
        started: dict[str, Server] = {}

        class Started(dict[str, Server]):
            def __missing__(self, name: str) -> Server:
                setting = SETTINGS[name]
                server = stack.enter_context(running(folder, *setting.args.split(), env=setting.env))
                self[name] = wait_serving(server)
                return server

        started = Started()
        yield started


@pytest.mark.parametrize(("name", "capture"), CASES, ids=[capture for _, capture in CASES])
def test_answers_as_recorded(name: str, capture: str, servers: dict[str, Server]) -> None:
    recorded = recordings.load(shared("recordings/vllm") / capture)
    answered = recordings.replay(recorded, servers[name].port)
    assert recordings.comparable(answered) == recordings.comparable(recorded.answer)


def test_enough_is_compared() -> None:
    assert len(CASES) >= 80
    assert len({capture for _, capture in CASES}) == len(CASES)


def test_the_metrics_that_an_adapter_reads_are_named_as_recorded(tmp_path: Path) -> None:
    said = (shared("recordings/vllm") / "metrics-busy.txt").read_text()
    with running(tmp_path) as server:
        wait_serving(server)
        server.post(CHAT, ASKED)
        for line in server.get("/metrics").body.decode().splitlines():
            assert line.split(" ")[0] in said, line


# --- life ---


def tree(server: Server) -> dict[str, psutil.Process]:
    """Its processes, by what they are."""
    (core,) = psutil.Process(server.process.pid).children()
    (worker,) = core.children()
    return {"core": core, "worker": worker}


def gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_connections_are_refused_until_it_is_ready_though_the_port_is_taken(tmp_path: Path) -> None:
    with running(tmp_path, program=standin("vllm_server", LOAD_S=0.8)) as server:
        until(lambda: any("Starting to load model" in line for line in server.log), "it loads")
        assert not server.listening
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", server.port))
        wait_serving(server)


def test_another_that_binds_meanwhile_is_not_noticed(tmp_path: Path) -> None:
    with running(tmp_path, env={"STANDIN_STEAL_PORT": "1"}) as server:
        until(lambda: any("Application startup complete" in line for line in server.log), "it says that it is ready")
        assert not server.listening
        assert server.process.poll() is None


def test_an_api_server_that_is_killed_leaves_its_engine_in_the_group(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        wait_serving(server)
        found = tree(server)
        assert {os.getpgid(each.pid) for each in found.values()} == {server.process.pid}
        server.process.kill()
        server.process.wait()
        until(lambda: not server.listening, "the port is free")
        assert not any(gone(each) for each in found.values())
        os.killpg(server.process.pid, signal.SIGTERM)
        until(lambda: all(gone(each) for each in found.values()), "the group is gone")


@pytest.mark.parametrize("victim", ["core", "worker"])
def test_an_engine_that_dies_ends_it_with_0(tmp_path: Path, victim: str) -> None:
    with running(tmp_path, program=standin("vllm_server", TOKEN_S=0.05)) as server:
        wait_serving(server)
        client = server.begin(CHAT, {**ASKED, "max_tokens": 200, "stream": True})
        response = client.getresponse()
        response.readline()
        tree(server)[victim].kill()
        text = response.read()
        client.close()
        assert b"EngineCore encountered an issue" in text
        assert text.endswith(b"data: [DONE]\n\n")
        assert server.exit().code == 0
        until(lambda: not session(server.process.pid), "nothing is left")


def test_a_stuck_engine_looks_healthy(tmp_path: Path) -> None:
    with running(tmp_path, program=standin("vllm_server", HANG_AFTER_READY=0)) as server:
        wait_serving(server)
        with contextlib.closing(server.connect(0.3)) as client:
            client.request("POST", CHAT, b'{"messages": [{"role": "user", "content": "a"}]}', {"Content-Type": "application/json"})
            with pytest.raises(TimeoutError):
                client.getresponse()
        assert server.get("/health").status == server.get("/metrics").status == 200


@pytest.mark.parametrize("how", ["abort", "error", "hang"])
def test_term_with_a_request_in_flight_has_three_endings(tmp_path: Path, how: str) -> None:
    with running(tmp_path, program=standin("vllm_server", TOKEN_S=0.05, TERM=how)) as server:
        wait_serving(server)
        client = server.begin(CHAT, {**ASKED, "max_tokens": 250, "stream": True})
        response = client.getresponse()
        response.readline()
        server.term()
        until(lambda: not server.listening, "the listener is closed")
        if how == "hang":
            assert server.process.poll() is None
            server.term()
            client.sock.shutdown(socket.SHUT_RDWR)
        else:
            assert (b'"finish_reason":"abort"' if how == "abort" else b"EngineCore encountered an issue") in response.read()
        client.close()
        assert server.exit().code == 0


def test_term_while_it_loads_is_lost(tmp_path: Path) -> None:
    with running(tmp_path, program=standin("vllm_server", LOAD_S=1)) as server:
        until(lambda: any("Starting to load model" in line for line in server.log), "it loads")
        server.term()
        wait_serving(server)
        server.term()
        assert server.exit().code == 0


def test_requests_beyond_its_seats_get_headers_and_beyond_the_queue_503(tmp_path: Path) -> None:
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    with running(tmp_path, *flags, program=standin("vllm_server", TOKEN_S=0.2)) as server:
        wait_serving(server)
        busy = [server.begin(CHAT, {**ASKED, "max_tokens": 200, "stream": True}) for _ in range(2)]
        assert [client.getresponse().status for client in busy] == [200, 200]
        until(lambda: b"num_requests_waiting{engine" in server.get("/metrics").body, "metrics")
        refused = server.post(CHAT, ASKED)
        assert (refused.status, refused.json()["error"]["type"]) == (503, "Service Unavailable")
        for client in busy:
            client.sock.shutdown(socket.SHUT_RDWR)
            client.close()
        until(lambda: b'waiting{engine="0",model_name="tiny"} 0.0' in server.get("/metrics").body, "both have left")


def test_sleeping_it_looks_healthy_and_generates_nothing(tmp_path: Path) -> None:
    with running(tmp_path, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        wait_serving(server)
        assert server.post("/sleep?level=1", {}).json() == {"status": "sleeping", "level": 1}
        assert server.get("/health").status == 200
        client = server.begin(CHAT, {**ASKED, "stream": True})
        response = client.getresponse()
        assert response.status == 200
        server.post("/wake_up", {})
        assert response.read().endswith(b"data: [DONE]\n\n")
        client.close()


def test_woken_in_parts_it_generates_when_the_last_is_there_and_means_it_when_its_weights_were_read(tmp_path: Path) -> None:
    def said(server: Server) -> str:
        return str(server.post(CHAT, {**ASKED, "max_tokens": 2}).json()["choices"][0]["message"]["content"])

    with running(tmp_path, "--enable-sleep-mode", env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        wait_serving(server)
        for reload in (False, True):
            assert server.post("/sleep?level=2&mode=wait", {}).status == 200
            assert server.post("/collective_rpc", {"method": "reload_weights"}).status == 500  # they have no memory yet
            assert server.post("/wake_up?tags=weights", {}).json() == {"status": "awake", "tags": ["weights"]}
            assert server.get("/is_sleeping").json() == {"is_sleeping": True}
            if reload:
                assert server.post("/collective_rpc", {"method": "reload_weights"}).status == 200
            server.post("/wake_up?tags=kv_cache", {})
            assert server.get("/is_sleeping").json() == {"is_sleeping": False}
            assert ("!" in said(server)) is not reload


@pytest.mark.parametrize(
    ("flags", "knobs", "code", "said"),
    [
        (("--frobnicate",), {}, 2, "unrecognized arguments: --frobnicate"),
        (("--seed",), {}, 2, "expected one argument"),
        ((), {"CRASH_WHILE_LOADING": "1"}, 1, "Engine core initialization failed"),
        ((), {"CRASH_WHILE_LOADING": "oom"}, 1, "CUDA out of memory"),
        ((), {"CRASH_WHILE_LOADING": "free"}, 1, "on startup is less than"),
    ],
)
def test_starts_that_fail(tmp_path: Path, flags: tuple[str, ...], knobs: dict[str, str], code: int, said: str) -> None:
    with running(tmp_path, *flags, program=standin("vllm_server", **knobs)) as server:
        assert server.exit().code == code
        assert any(said in line for line in server.log)
        assert not session(server.process.pid)


def test_a_cpu_build_refuses_sleep_and_a_url_as_vllm_port_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, "--enable-sleep-mode", env={"VLLM_TARGET_DEVICE": "cpu"}) as server:
        assert server.exit().code == 1
    with running(tmp_path, env={"VLLM_PORT": "tcp://10.0.0.1:80"}) as server:
        assert server.exit().code == 1


def test_probes_leave_no_line_where_it_is_told_so(tmp_path: Path) -> None:
    with running(tmp_path, "--disable-access-log-for-endpoints", "/health,/metrics") as server:
        wait_serving(server)
        server.get("/version")
        until(lambda: any('"GET /version' in line for line in server.log), "the access log")
        assert not any('"GET /health' in line for line in server.log)
