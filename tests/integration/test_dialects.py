"""Every dialect over every engine: passed on where the engine speaks it, translated where not; refusals in each client's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from offloadd.proxy.dialects.anthropic_answers import MessageMerge
from tests.conformance.servers import HOST
from tests.integration.daemon import HELLO, Daemon
from tests.integration.engines import Elsewhere, daemon_of, elsewhere, served_by
from tests.unit.proxy.dialects.streams import events
from tests.unit.proxy.dialects.test_anthropic import check_order

ENGINES = ("llamacpp", "vllm", "tgi", "own", "odd", "cloud")
SAID = "the night was calm"


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    with elsewhere(tmp_path_factory.mktemp("away"), TOKEN_S=0.005) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, away: Elsewhere) -> Iterator[Daemon]:
    models = {f"on-{name}": served_by(name) for name in ENGINES} | {"off": served_by("llamacpp", run="never")}
    with daemon_of(tmp_path_factory.mktemp("dialects"), models, away.entry) as found:
        yield found


@pytest.mark.parametrize("name", ENGINES)
def test_anthropic(daemon: Daemon, name: str) -> None:
    asked: dict[str, Any] = {"model": f"on-{name}", "max_tokens": 4, "system": "Be brief.", "messages": HELLO}
    whole = daemon.post("/v1/messages", asked)
    assert whole.status == 200, whole.body
    assert whole.headers["X-Offloadd-Backend"] == name
    message = whole.json()
    assert message["content"] == [{"type": "text", "text": SAID}]
    assert (message["model"], message["stop_reason"], message["usage"]["output_tokens"]) == (f"on-{name}", "max_tokens", 4)
    streamed = daemon.post("/v1/messages", {**asked, "stream": True})
    assert streamed.headers["Content-Type"].startswith("text/event-stream")
    found = events(streamed.body)
    check_order(found)
    merge = MessageMerge()
    for event in found:
        merge.add(event)
    assert merge.answer()["content"] == message["content"]


@pytest.mark.parametrize("name", ENGINES)
def test_responses(daemon: Daemon, name: str) -> None:
    """None of these servers has them, though some might: there the first request finds it out."""
    with openai.OpenAI(base_url=f"http://{HOST}:{daemon.port}/v1", api_key="unused", max_retries=0) as client:
        tools: Any = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
        if name == "odd":  # its own JSON has no place for them
            with pytest.raises(openai.BadRequestError, match="does not offer tools"):
                client.responses.create(model="on-odd", input="Hello", tools=tools)
            tools = []
        asked: dict[str, Any] = {"model": f"on-{name}", "input": "Hello", "instructions": "Be brief.", "max_output_tokens": 4}
        raw = client.responses.with_raw_response.create(**asked, tools=tools, store=False)
        assert raw.headers["X-Offloadd-Backend"] == name
        whole = raw.parse()
        assert (whole.output_text.strip(), whole.status, whole.model) == (SAID, "incomplete", f"on-{name}")
        assert whole.usage
        assert (whole.usage.output_tokens, len(whole.tools)) == (4, len(tools))
        found = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in found] == list(range(len(found)))
        assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == whole.output_text
        assert found[-1].type == "response.incomplete"
        assert found[-1].response.output_text == whole.output_text
        with client.responses.stream(**asked) as stream:  # puts the texts together by itself, from the events
            (done,) = [event for event in stream if event.type == "response.output_text.done"]
        assert done.text == whole.output_text
        again = [{"role": "user", "content": "Hello"}, *(item.to_dict() for item in whole.output), {"role": "user", "content": "x"}]
        assert client.responses.create(**{**asked, "input": again}).output_text
        with pytest.raises(openai.BadRequestError, match='"previous_response_id": no responses are stored') as caught:
            client.responses.create(**asked, previous_response_id=whole.id)
        assert (caught.value.code, caught.value.param) == ("unsupported_capability", "previous_response_id")


@pytest.mark.parametrize("name", ENGINES)
def test_ollama(daemon: Daemon, name: str) -> None:
    asked: dict[str, Any] = {"model": f"on-{name}:latest", "messages": HELLO, "options": {"num_predict": 4, "num_ctx": 99}}
    streamed = daemon.post("/api/chat", asked)
    assert streamed.status == 200, streamed.body
    assert streamed.headers["Content-Type"] == "application/x-ndjson"
    assert streamed.headers["X-Offloadd-Ignored"] == "num_ctx"
    *pieces, last = [json.loads(line) for line in streamed.body.splitlines()]
    assert "".join(piece["message"]["content"] for piece in pieces) == SAID
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 4)
    whole = daemon.post("/api/chat", {**asked, "stream": False}).json()
    assert (whole["message"]["content"], whole["eval_count"], whole["model"]) == (SAID, 4, f"on-{name}")
    text = daemon.post(
        "/api/generate", {"model": f"on-{name}", "prompt": "x", "raw": True, "stream": False, "options": {"num_predict": 4}}
    )
    assert text.json()["response"].strip() == SAID


@pytest.mark.parametrize("name", ENGINES)
def test_tgi(daemon: Daemon, name: str) -> None:
    asked = {"inputs": "x", "parameters": {"max_new_tokens": 4, "details": True}}
    whole = daemon.post(f"/tgi/on-{name}/generate", asked)
    assert whole.status == 200, whole.body
    assert whole.json()["generated_text"].strip() == SAID
    assert whole.json()["details"]["finish_reason"] == "length"
    assert whole.json()["details"]["generated_tokens"] == 4
    streamed = daemon.post(f"/tgi/on-{name}/generate_stream", asked)
    found = events(streamed.body)
    assert found[-1]["generated_text"] == "".join(event["token"]["text"] for event in found if not event["token"]["special"])
    (listed,) = daemon.post(f"/tgi/on-{name}", asked).json()
    assert listed == whole.json()
    assert daemon.get(f"/tgi/on-{name}/info")["model_id"] == f"on-{name}"


def test_streams_of_openai_have_one_name_and_one_id(daemon: Daemon) -> None:
    for name in ENGINES:
        *chunks, done = daemon.events(f"on-{name}", tokens=3)
        assert done == "[DONE]"
        assert {chunk["model"] for chunk in chunks} == {f"on-{name}"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[0]["id"]


def test_counting_tokens(daemon: Daemon) -> None:
    asked = {"messages": HELLO}
    assert daemon.post("/v1/messages/count_tokens", {"model": "on-tgi", **asked}).json()["input_tokens"] > 0
    refused = daemon.post("/v1/messages/count_tokens", {"model": "on-cloud", **asked})
    assert refused.status == 400
    assert "does not offer counting tokens" in refused.json()["error"]["message"]


# --- refusals ---

BODIES: dict[str, Any] = {
    "/v1/messages": {"max_tokens": 4, "messages": HELLO},
    "/api/chat": {"messages": HELLO},
    "/generate": {"inputs": "x"},
    "/v1/chat/completions": {"messages": HELLO},
}


def message_of(path: str, body: Any) -> str:
    """The sentence of an error in the shape that the clients of a path expect."""
    if path == "/v1/messages":
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
    elif path == "/api/chat":
        return str(body["error"])
    elif path == "/generate":
        assert body["error_type"]
        return str(body["error"])
    return str(body["error"]["message"])


@pytest.mark.parametrize("path", BODIES)
def test_our_refusals_have_each_clients_shape(daemon: Daemon, path: str) -> None:
    unknown = daemon.post(path, {"model": "on-tg", **BODIES[path]})
    assert unknown.status == 404
    assert "did you mean on-tgi" in message_of(path, unknown.json())
    disabled = daemon.post(path, {"model": "off", **BODIES[path]})
    assert disabled.status == 409
    assert message_of(path, disabled.json())
    broken = daemon.post(path, b'{"model": "on-tgi", ')
    assert broken.status == (422 if path == "/generate" else 400)
    assert "not JSON" in message_of(path, broken.json())
    method = daemon.request("PUT", path, b"{}")
    assert method.status == 405
    assert message_of(path, method.json())


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/generate"])
def test_an_engines_refusal_too(daemon: Daemon, path: str) -> None:
    messages = [{"role": "user", "content": "word " * 60_000}]
    for stream in (False, True):
        reply = daemon.post(path, {"model": "on-vllm", "max_tokens": 4, "messages": messages, "stream": stream})
        assert reply.status == 400, reply.body[:300]
        assert message_of(path, reply.json())
        assert reply.headers["X-Offloadd-Instance"].startswith("on-vllm")
