"""What any server behind offloadd's llama.cpp adapter must do. One suite, run on the real program and on the stand-in alike."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from offloadd.backends.llamacpp import BACKEND, LlamaCppOptions
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus, Health
from tests.conformance.servers import Reply, Server, Subject, embedding_options, until

HELLO = [{"role": "user", "content": "Say hello in one short sentence."}]
ENDLESS = {"messages": HELLO, "max_tokens": 1500, "ignore_eos": True}
"""Keeps a slot busy for longer than any test looks at it."""
CHAT = "/v1/chat/completions"
TIMINGS = {"cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"}
TIMINGS |= {"predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"}


def reading(server: Server, path: str) -> Health:
    """The adapter's view of one path."""
    return BACKEND.read_probe(server.spec, path, server.probe(path))


def cause_of(server: Server, status: ExitStatus) -> ExitCause:
    """The adapter's view of an end before it was ready."""
    return BACKEND.explain_exit(status, server.log, was_ready=False)


def assert_error(reply: Reply, status: int, kind: str, text: str) -> None:
    assert reply.status == status
    error = reply.json()["error"]
    assert (error["code"], error["type"]) == (status, kind)
    assert text in error["message"]


class Conformance:
    """A subclass provides the fixture `subject`, scoped to the class."""

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, subject: Subject) -> Iterator[Server]:
        """One ready server for the tests that leave it as they found it."""
        with subject.start() as server:
            server.wait_ready()
            yield server

    @pytest.fixture
    def server(self, subject: Subject) -> Iterator[Server]:
        """A ready server of the test's own."""
        with subject.start() as server:
            server.wait_ready()
            yield server

    # --- start ---

    def test_loading_answers_503_on_every_path(self, subject: Subject) -> None:
        with subject.start_slowly() as server:
            server.wait_listening()
            for path in ("/health", "/v1/models", "/slots", "/nope"):
                assert_error(server.get(path), 503, "unavailable_error", "Loading model")
            assert_error(server.post(CHAT, {"messages": HELLO}), 503, "unavailable_error", "Loading model")
            server.wait_ready()

    def test_adapter_reads_loading_then_ready(self, subject: Subject) -> None:
        with subject.start_slowly() as server:
            assert BACKEND.read_probe(server.spec, "/health", server.probe("/health")) in (Health.SILENT, Health.LOADING)
            until(lambda: reading(server, "/health") is Health.LOADING, "the adapter reads LOADING")
            server.wait_ready()
            assert [reading(server, probe.path) for probe in BACKEND.probes(server.spec).readiness] == [Health.READY] * 3

    def test_a_server_with_another_model_is_not_ours(self, shared: Server, subject: Subject) -> None:
        other = subject.spec(name="other")
        assert BACKEND.read_probe(other, "/v1/models", shared.probe("/v1/models")) is Health.SILENT

    def test_log_says_in_order_what_happened(self, shared: Server) -> None:
        said = [line.split(": ", 1)[-1] for line in shared.log]
        steps = (
            "loading model '",
            "initializing, n_slots = 2, n_ctx_slot = 2048",
            "model loaded",
            "listening on http://127.0.0.1:",
        )
        positions = [next(at for at, line in enumerate(said) if line.startswith(step)) for step in steps]
        assert positions == sorted(positions)

    def test_version_is_on_stderr_and_help_on_stdout(self, subject: Subject) -> None:
        env = dict(subject.env)
        version = subprocess.run([*subject.command, *BACKEND.version_argv], capture_output=True, env=env, check=True)
        assert version.stderr.startswith(b"version: ")
        assert subprocess.run([*subject.command, "--help"], capture_output=True, env=env, check=True).stdout

    # --- answers ---

    def test_models_lists_the_alias(self, shared: Server) -> None:
        found = shared.get("/v1/models").json()
        assert [entry["id"] for entry in found["data"]] == ["tiny"]
        assert found["object"] == "list"
        assert found["data"][0]["owned_by"] == "llamacpp"
        assert found["data"][0]["meta"]["n_ctx"] == 2048

    def test_slots_are_as_many_as_asked_for(self, shared: Server) -> None:
        slots = shared.get("/slots").json()
        assert [slot["id"] for slot in slots] == [0, 1]
        assert {slot["n_ctx"] for slot in slots} == {2048}
        assert shared.get("/props").json()["total_slots"] == 2

    def test_chat_answers_whole(self, shared: Server) -> None:
        reply = shared.post(CHAT, {"model": "anything", "messages": HELLO, "max_tokens": 5, "temperature": 0})
        found = reply.json()
        assert reply.status == 200
        assert "Content-Length" in reply.headers
        assert found["object"] == "chat.completion"
        assert found["model"] == "tiny"
        assert found["id"].startswith("chatcmpl-")
        assert found["choices"][0]["message"]["role"] == "assistant"
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 5
        assert set(found["timings"]) >= TIMINGS

    def test_chat_streams(self, shared: Server) -> None:
        reply = shared.post(CHAT, {"messages": HELLO, "max_tokens": 5, "temperature": 0, "stream": True})
        first, *tokens, last, done = reply.events
        assert reply.headers["Content-Type"] == "text/event-stream"
        assert reply.headers["Transfer-Encoding"] == "chunked"
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert all(set(event["choices"][0]["delta"]) == {"content"} for event in tokens)
        assert len(tokens) == 5
        assert last["choices"][0] == {"finish_reason": "length", "index": 0, "delta": {}}
        assert set(last["timings"]) >= TIMINGS
        assert done == "[DONE]"

    def test_chat_streams_usage_when_asked(self, shared: Server) -> None:
        asked = {"messages": HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
        *_, last, usage, done = shared.post(CHAT, asked).events
        assert last["choices"][0]["finish_reason"] == "length"
        assert "timings" not in last
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 3
        assert set(usage["timings"]) >= TIMINGS
        assert done == "[DONE]"

    def test_completions_answer_whole_and_stream(self, shared: Server) -> None:
        asked: dict[str, Any] = {"prompt": "The sky is", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        whole = shared.post("/v1/completions", asked).json()
        assert whole["object"] == "text_completion"
        assert whole["choices"][0]["finish_reason"] == "length"
        *tokens, last, done = shared.post("/v1/completions", {**asked, "stream": True}).events
        assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
        assert last["choices"][0]["text"] == ""
        assert last["usage"]["completion_tokens"] == 4
        assert done == "[DONE]"

    def test_native_completion_streams_without_done(self, shared: Server) -> None:
        asked = {"prompt": "The sky is", "n_predict": 4, "stream": True, "ignore_eos": True}
        *tokens, last = shared.post("/completion", asked).events
        assert [event["stop"] for event in tokens] == [False] * 4
        assert last["stop"] is True
        assert last["stop_type"] == "limit"

    def test_tokenize(self, shared: Server) -> None:
        assert all(isinstance(token, int) for token in shared.post("/tokenize", {"content": "hello world"}).json()["tokens"])

    def test_metrics_are_prometheus_text(self, shared: Server) -> None:
        reply = shared.get("/metrics")
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4"
        assert shared.metric("requests_processing") == 0

    # --- refusals ---

    def test_malformed_json_is_the_servers_error(self, shared: Server) -> None:
        assert_error(shared.post(CHAT, b'{"messages": ['), 500, "server_error", "parse error")

    def test_missing_messages_is_the_clients_error(self, shared: Server) -> None:
        assert_error(shared.post(CHAT, {"model": "x"}), 400, "invalid_request_error", "'messages' is required")

    def test_prompt_longer_than_a_slot_is_refused_before_the_stream(self, shared: Server) -> None:
        asked = {"messages": [{"role": "user", "content": "word " * 2200}], "stream": True}
        assert_error(shared.post(CHAT, asked), 400, "exceed_context_size_error", "exceeds the available context size (2048 tokens)")

    def test_unknown_path_and_wrong_method_are_not_found(self, shared: Server) -> None:
        for method, path in (("GET", "/v1/nope"), ("POST", "/v1/nope"), ("GET", CHAT), ("DELETE", CHAT), ("POST", "/v1/models")):
            assert_error(shared.request(method, path, {} if method == "POST" else None), 404, "not_found_error", "File Not Found")

    def test_embeddings_need_their_flag(self, shared: Server) -> None:
        assert_error(shared.post("/v1/embeddings", {"input": "hi"}), 501, "not_supported_error", "--embeddings")

    def test_embeddings(self, subject: Subject) -> None:
        with subject.start(spec=subject.spec(options=embedding_options())) as server:
            server.wait_ready()
            found = server.post("/v1/embeddings", {"input": ["hi", "there"]}).json()
            assert [entry["index"] for entry in found["data"]] == [0, 1]
            assert all(isinstance(number, float) for number in found["data"][0]["embedding"])
            assert found["usage"]["prompt_tokens"] > 0

    # --- slots and clients that leave ---

    def test_a_stream_ends_when_its_client_leaves(self, server: Server) -> None:
        client = server.begin(CHAT, {**ENDLESS, "stream": True})
        assert client.getresponse().status == 200
        assert server.busy_slots() == 1
        client.close()
        until(lambda: server.busy_slots() == 0, "the slot is free", 5)
        assert server.metric("tokens_predicted_total") < 900

    def test_any_other_request_runs_to_its_end_for_nobody(self, server: Server) -> None:
        client = server.begin(CHAT, {**ENDLESS, "max_tokens": 100})
        until(lambda: server.busy_slots() == 1, "the slot is taken")
        client.close()
        until(lambda: server.metric("tokens_predicted_total") == 100, "all tokens were made", 60)

    def test_requests_beyond_the_slots_wait_without_a_byte(self, server: Server) -> None:
        with contextlib.ExitStack() as clients:
            first = clients.enter_context(contextlib.closing(server.begin(CHAT, {**ENDLESS, "stream": True})))
            second = clients.enter_context(contextlib.closing(server.begin(CHAT, {**ENDLESS, "stream": True})))
            for client in (first, second):
                assert client.getresponse().status == 200
            third = clients.enter_context(contextlib.closing(server.begin(CHAT, {**ENDLESS, "stream": True})))
            until(lambda: server.metric("requests_deferred") == 1, "the third request waits")
            assert server.get("/slots?fail_on_no_slot=1").status == 503
            assert select.select([third.sock], [], [], 0)[0] == []
            first.close()
            assert third.getresponse().status == 200

    # --- stop ---

    def test_sigterm_while_idle_ends_cleanly(self, server: Server) -> None:
        # /health says 200 a moment before the handler of signals is there; this line comes after it.
        until(lambda: any("listening on" in line for line in server.log), "it says that it listens")
        server.term()
        assert server.exit() == ExitStatus(code=0)
        assert "cleaning up before exit..." in server.log[-1]

    def test_sigterm_while_loading_kills(self, subject: Subject) -> None:
        with subject.start_slowly() as server:
            server.wait_listening()
            server.term()
            status = server.exit()
            assert status == ExitStatus(signal=15)
            assert cause_of(server, status).kind is ExitKind.KILLED

    def test_sigterm_waits_for_the_clients_of_requests_in_flight(self, server: Server) -> None:
        client = server.begin(CHAT, ENDLESS)
        until(lambda: server.busy_slots() == 1, "the slot is taken")
        server.term()
        until(lambda: not server.listening, "the port closes")
        assert server.process.poll() is None
        client.close()
        assert server.exit() == ExitStatus(code=0)

    def test_second_sigterm_ends_at_once(self, server: Server) -> None:
        with contextlib.closing(server.begin(CHAT, ENDLESS)):
            until(lambda: server.busy_slots() == 1, "the slot is taken")
            server.term()
            until(lambda: "cleaning up before exit" in server.log[-1], "the first SIGTERM is heard")
            server.term()
            assert server.exit() == ExitStatus(code=1)
        assert server.log[-1] == "Received second interrupt, terminating immediately."

    # --- failed starts: exit 1 each, told apart by their text alone ---

    def test_missing_model(self, subject: Subject) -> None:
        cause = self._failed_start(subject, model=subject.folder / "nope.gguf")
        assert (cause.kind, cause.permanent) == (ExitKind.BAD_MODEL, True)
        assert "nope.gguf: No such file or directory" in cause.message

    def test_truncated_model(self, subject: Subject) -> None:
        cut = subject.folder / "cut.gguf"
        shutil.copyfile(subject.model, cut)
        os.truncate(cut, cut.stat().st_size // 2)
        cause = self._failed_start(subject, model=cut)
        assert (cause.kind, cause.permanent) == (ExitKind.BAD_MODEL, True)
        assert "truncated" in cause.message

    def test_garbage_model(self, subject: Subject) -> None:
        garbage = subject.folder / "garbage.gguf"
        garbage.write_bytes(b"this was never a model")
        cause = self._failed_start(subject, model=garbage)
        assert cause.kind is ExitKind.BAD_MODEL
        assert "invalid magic characters" in cause.message

    def test_unknown_flag(self, subject: Subject) -> None:
        cause = self._failed_start(subject, spec=subject.spec(args=("--frobnicate",)))
        assert cause.kind is ExitKind.BAD_OPTION
        assert "--frobnicate" in cause.message

    def test_bad_value(self, subject: Subject) -> None:
        cause = self._failed_start(subject, spec=subject.spec(args=("--parallel", "many")))
        assert cause.kind is ExitKind.BAD_OPTION
        assert "--parallel" in cause.message

    def test_a_cache_that_needs_flash_attention_is_not_taken_for_too_little_memory(self, subject: Subject) -> None:
        options = {"llamacpp": LlamaCppOptions(flash_attention="off", cache_type_v="q8_0")}
        cause = self._failed_start(subject, spec=subject.spec(options=options))
        assert (cause.kind, cause.permanent) == (ExitKind.BAD_OPTION, True)
        assert "flash" in cause.hint

    def test_port_in_use(self, subject: Subject, shared: Server) -> None:
        cause = self._failed_start(subject, port=shared.port)
        assert (cause.kind, cause.permanent) == (ExitKind.PORT_TAKEN, False)
        assert str(shared.port) in cause.message

    def _failed_start(self, subject: Subject, **how: Any) -> ExitCause:
        with subject.start(**how) as server:
            status = server.exit()
            assert status == ExitStatus(code=1)
            return cause_of(server, status)
