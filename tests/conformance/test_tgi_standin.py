"""The stand-in for TGI held to TGI's own API description, to its documented lifecycle, and to the clients that people use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonschema
import psutil
import pytest
import text_generation
from text_generation.errors import OverloadedError, ValidationError

from tests.conformance.processes import Program, Server, free_port, session, standin, until, wait_serving
from tests.conformance.shared import shared

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # the client text_generation
ASKED = {"inputs": "My name is", "parameters": {"max_new_tokens": 4, "details": True}}
CHAT = {"model": "tgi", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
PROMPT = {"prompt": "hello there", "max_tokens": 4}


@contextlib.contextmanager
def running(folder: Path, *flags: str, program: Program | None = None, env: dict[str, str] | None = None) -> Iterator[Server]:
    port = free_port()
    given = ["--model-id", "org/tiny", "--hostname", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    given += ["--shard-uds-path", str(folder / f"shard-{port}"), "--master-port", str(free_port()), *flags]
    with (program or standin("tgi_launcher")).run(given, folder, port, env) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("tgi"), "--max-total-tokens", "64", "--max-input-tokens", "40") as found:
        yield wait_serving(found)


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared("tgi-openapi.json").read_text())
    return found


@pytest.fixture(scope="module")
def check(description: dict[str, Any]) -> Callable[[Any, str], None]:
    """Validates a value against one of the schemas; a field that the description does not name is an error, too."""
    schemas = {name: _strict(_nullable(schema)) for name, schema in description["components"]["schemas"].items()}

    def validate(value: Any, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        jsonschema.Draft202012Validator(schema).validate(value)

    return validate


def _nullable(schema: Any) -> Any:
    """OpenAPI 3.0's `nullable` in today's words."""
    if isinstance(schema, list):
        return [_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _nullable(value) for key, value in schema.items() if key not in ("nullable", "discriminator", "exclusiveMinimum")}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The description leaves `object` out of OpenAI's answers, which TGI writes."""
    if schema.get("type") == "object" and "properties" in schema:
        return {**schema, "properties": {"object": {"type": "string"}, **schema["properties"]}, "additionalProperties": False}
    return schema


# --- answers ---


def test_native_answers(server: Server, check: Callable[[Any, str], None]) -> None:
    whole = server.post("/generate", ASKED)
    assert whole.status == 200
    check(whole.json(), "GenerateResponse")
    assert whole.json()["details"]["generated_tokens"] == 4
    assert whole.headers["x-generated-tokens"] == "4"
    short = server.post("/generate", {"inputs": "My name is", "parameters": {"max_new_tokens": 2, "return_full_text": True}})
    assert short.json() == {"generated_text": "My name isthe night"}
    for found in server.post("/", ASKED).json():
        check(found, "GenerateResponse")


def test_native_stream(server: Server, check: Callable[[Any, str], None]) -> None:
    for path, body in (("/generate_stream", ASKED), ("/", {**ASKED, "stream": True})):
        events = server.post(path, body).events
        for event in events:
            check(event, "StreamResponse")
        assert [event["generated_text"] for event in events] == [None, None, None, "the night was calm"]
        assert events[-1]["details"]["finish_reason"] == "length"


def test_openai_answers(server: Server, check: Callable[[Any, str], None]) -> None:
    check(server.post("/v1/chat/completions", CHAT).json(), "ChatCompletion")
    check(server.post("/v1/completions", PROMPT).json(), "CompletionFinal")


def test_openai_streams(server: Server, check: Callable[[Any, str], None]) -> None:
    events = server.post("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}).events
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        check(event, "ChatCompletionChunk")
    assert {event["id"] for event in events[:-1]} == {""}
    assert [choice["delta"]["role"] for event in events[:-2] for choice in event["choices"]] == ["assistant"] * 4
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 4
    events = server.post("/v1/completions", {**PROMPT, "stream": True}).events
    assert events[-1] == "[DONE]"
    for event in events[:-2]:
        check(event, "Chunk")
    check(events[-2], "CompletionFinal")


def test_what_it_says_of_itself(server: Server, check: Callable[[Any, str], None]) -> None:
    check(server.get("/info").json(), "Info")
    (model,) = server.get("/v1/models").json()["data"]
    check(model, "ModelInfo")
    assert model["created"] == 0
    check(server.post("/tokenize", ASKED).json(), "TokenizeResponse")
    check(server.post("/chat_tokenize", CHAT).json(), "ChatTokenizeResponse")
    assert server.get("/health").body == b""
    assert b"tgi_batch_max_total_tokens" in server.get("/metrics").body


def test_every_described_path_is_there(server: Server, description: dict[str, Any]) -> None:
    for path, methods in description["paths"].items():
        for method in methods:
            assert server.request(method.upper(), path, {} if method == "post" else None).status not in (404, 405), path


def test_finish_reasons(server: Server) -> None:
    def finish(**parameters: Any) -> str:
        asked = {"inputs": "a", "parameters": {"details": True, **parameters}}
        return str(server.post("/generate", asked).json()["details"]["finish_reason"])

    assert finish() == "eos_token"
    assert finish(max_new_tokens=2) == "length"
    assert finish(stop=["night"]) == "stop_sequence"
    chat = server.post("/v1/chat/completions", {"messages": CHAT["messages"]})
    assert chat.json()["choices"][0]["finish_reason"] == "stop"
    chat = server.post("/v1/chat/completions", {**CHAT, "stop": ["night"]})
    assert chat.json()["choices"][0]["finish_reason"] == "stop_sequence"


# --- refusals ---


def test_errors_outside_streams(server: Server, check: Callable[[Any, str], None]) -> None:
    too_long = {"inputs": "a " * 41}
    too_much = {"inputs": "a", "parameters": {"max_new_tokens": 4000}}
    none = {"inputs": "a", "parameters": {"max_new_tokens": 0}}
    for body, said in ((too_long, "must have less than 40 tokens"), (too_much, "must be <= 64"), (none, "strictly positive")):
        reply = server.post("/generate", body)
        assert reply.status == 422
        check(reply.json(), "ErrorResponse")
        assert said in reply.json()["error"]
        assert reply.json()["error_type"] == "validation"


def test_errors_within_streams_come_with_status_200(server: Server, check: Callable[[Any, str], None]) -> None:
    reply = server.post("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 4000}})
    assert reply.status == 200
    (event,) = reply.events
    check(event, "ErrorResponse")
    reply = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 4000, "stream": True})
    assert reply.status == 200
    error, done = reply.events
    assert error["error"]["http_status_code"] == 422
    assert done == "[DONE]"


def test_the_framework_answers_in_plain_text(server: Server) -> None:
    assert server.get("/nope").status == 404
    assert server.get("/generate").status == 405
    missing = server.post("/generate", {})
    assert (missing.status, missing.headers["Content-Type"]) == (422, "text/plain; charset=utf-8")
    assert server.post("/generate", b"{").status == 400


def test_keys_are_compared_without_case_and_looking_needs_none(tmp_path: Path) -> None:
    with running(tmp_path, "--api-key", "Secret") as server:
        wait_serving(server)
        refused = server.post("/generate", ASKED)
        assert (refused.status, refused.body) == (401, b"")
        assert text_generation.Client(f"http://127.0.0.1:{server.port}", {"Authorization": "bearer SECRET"}).generate("a")
        assert server.get("/info").status == server.get("/v1/models").status == 200


def test_overload_is_429_and_tokens_beyond_the_batch_wait(tmp_path: Path) -> None:
    slow = standin("tgi_launcher", TOKEN_S=0.1)
    with running(tmp_path, "--max-concurrent-requests", "2", "--max-batch-size", "1", program=slow) as server:
        wait_serving(server)
        busy = [server.begin("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 100}}) for _ in range(2)]
        until(lambda: b"tgi_queue_size 1" in server.get("/metrics").body, "one request waits")
        assert b"tgi_batch_current_size 1" in server.get("/metrics").body
        reply = server.post("/generate", ASKED)
        assert (reply.status, reply.json()["error_type"]) == (429, "overloaded")
        with pytest.raises(OverloadedError):
            text_generation.Client(f"http://127.0.0.1:{server.port}").generate("a", max_new_tokens=1)
        for client in busy:
            client.sock.shutdown(socket.SHUT_RDWR)
            client.close()
        until(lambda: b"tgi_batch_current_size 0" in server.get("/metrics").body, "those who left are dropped")


# --- clients ---


def test_text_generation(server: Server) -> None:
    client = text_generation.Client(f"http://127.0.0.1:{server.port}")
    whole = client.generate("My name is", max_new_tokens=3)
    assert whole.generated_text == "the night was"
    assert whole.details.generated_tokens == 3
    assert [event.token.text for event in client.generate_stream("My name is", max_new_tokens=3)] == ["the", " night", " was"]
    chat = client.chat(messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert chat.choices[0].message.content == "the night was"
    with pytest.raises(ValidationError):
        client.generate("a", max_new_tokens=4000)


def test_huggingface_hub(server: Server) -> None:
    client = huggingface_hub.InferenceClient(base_url=f"http://127.0.0.1:{server.port}")
    assert client.text_generation("My name is", max_new_tokens=3) == "the night was"
    assert list(client.text_generation("My name is", max_new_tokens=3, stream=True)) == ["the", " night", " was"]
    chat = client.chat_completion([{"role": "user", "content": "hi"}], max_tokens=3)
    assert chat.choices[0].message.content == "the night was"


# --- life ---


def test_ports_are_refused_until_it_is_ready_and_milestones_come_in_order(tmp_path: Path) -> None:
    with running(tmp_path, program=standin("tgi_launcher", LOAD_S=0.5)) as server:
        until(lambda: any("Starting shard" in line for line in server.log), "the shard is started")
        assert not server.listening
        wait_serving(server)
        steps = ("Starting check and download", "Successfully downloaded", "Starting shard", "Shard ready in", "Starting Webserver")
        steps += ("Warming up model", "Setting max batch total tokens to", "Using backend V3", "Connected")
        found = [next(number for number, line in enumerate(server.log) if step in line) for step in steps]
        assert found == sorted(found)


def test_every_child_has_a_group_of_its_own_and_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "--num-shard", "2") as server:
        wait_serving(server)
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 3
        assert all(os.getpgid(child.pid) == child.pid for child in children)
        server.process.kill()
        server.process.wait()
        assert server.get("/health").status == 200
        assert len(session(server.process.pid)) == 3


def test_term_lets_requests_end(tmp_path: Path) -> None:
    with running(tmp_path, program=standin("tgi_launcher", TOKEN_S=0.05)) as server:
        wait_serving(server)
        client = server.begin("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 10}})
        response = client.getresponse()
        response.readline()
        server.term()
        until(lambda: not server.listening, "the listener is closed")
        assert b'"finish_reason":"length"' in response.read()
        client.close()
        assert server.exit().code == 0
        assert not session(server.process.pid)


@pytest.mark.parametrize(("victim", "said"), [("shard", "Shard 0 crashed"), ("router", "Webserver Crashed")])
def test_a_child_that_dies_takes_the_whole_along(tmp_path: Path, victim: str, said: str) -> None:
    marks = tmp_path / "marks"
    with running(tmp_path, program=standin("tgi_launcher", MARK_FILE=marks)) as server:
        wait_serving(server)
        line = next(line for line in marks.read_text().splitlines() if f" {victim}" in line)
        psutil.Process(int(line.split()[0])).send_signal(signal.SIGKILL)
        assert server.exit().code == 1
        assert any(said in line for line in server.log)
        assert not session(server.process.pid)


@pytest.mark.parametrize(
    ("flags", "knobs", "code", "said"),
    [
        (("--frobnicate",), {}, 2, "unexpected argument '--frobnicate' found"),
        (("--num-shard", "many"), {}, 2, "invalid value 'many'"),
        (("--max-input-tokens", "9", "--max-total-tokens", "9"), {}, 1, "ArgumentValidation"),
        ((), {"CRASH_WHILE_LOADING": "3"}, 1, "ShardCannotStart"),
        ((), {"CRASH_WHILE_LOADING": "oom"}, 1, "Not enough memory to handle"),
    ],
)
def test_starts_that_fail(tmp_path: Path, flags: tuple[str, ...], knobs: dict[str, str], code: int, said: str) -> None:
    with running(tmp_path, *flags, program=standin("tgi_launcher", **knobs)) as server:
        assert server.exit().code == code
        assert any(said in line for line in server.log)


def test_ports_that_are_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flag, said in (("--port", "Failed to bind to addr"), ("--prometheus-port", "failed to build prometheus recorder")):
            with running(tmp_path, flag, port) as server:
                assert server.exit().code == 1
                assert any(said in line for line in server.log)


def test_instances_with_the_same_shard_socket_break_each_other(tmp_path: Path) -> None:
    shared = ("--shard-uds-path", str(tmp_path / "same"))
    with running(tmp_path, *shared) as first:
        wait_serving(first)
        with running(tmp_path, *shared):
            assert first.exit().code == 1


def test_plain_variables_are_options(tmp_path: Path) -> None:
    port = free_port()
    env = {"PORT": str(port), "HOSTNAME": "my-container", "MODEL_ID": "from/env", "PROMETHEUS_PORT": str(free_port())}
    env["SHARD_UDS_PATH"] = str(tmp_path / "uds")
    with standin("tgi_launcher").run([], tmp_path, port, env) as server:
        wait_serving(server)
        assert server.get("/info").json()["model_id"] == "from/env"
