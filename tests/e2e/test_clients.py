"""Clients as people have them, unmodified, against offloadd and the real llama-server: one daemon, one server for them all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.servers import HOST, until
from tests.e2e.conftest import Real
from tests.integration.daemon import Daemon, running

GRAVITY = [{"role": "user", "content": "What is gravity?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def daemon(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    models = {
        "smollm2": real.model(aliases=["gpt-4o-mini", "claude-local"], llamacpp={"embeddings": True, "pooling": "mean"}),
        "off": real.model(run="never"),
    }
    with running(tmp_path_factory.mktemp("clients"), models, llamacpp=real.llamacpp) as found:
        found.wait_for("smollm2")
        yield found


@pytest.fixture
def url(daemon: Daemon) -> str:
    return f"http://{HOST}:{daemon.port}"


def idle(daemon: Daemon) -> None:
    """The server's slots are free again, soon after a client has left."""
    until(lambda: daemon.load("smollm2") == 0, "the lease is back", 5)
    until(lambda: not any(slot["is_processing"] for slot in daemon.get("/upstream/smollm2/slots")), "the slot is free", 5)


class TestAnthropic:
    @pytest.fixture
    def client(self, url: str) -> Iterator[Any]:
        anthropic = pytest.importorskip("anthropic", reason="pip install .[clients]")
        with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
            yield client

    def test_a_message(self, client: Any) -> None:
        answer = client.messages.create(model="smollm2", max_tokens=20, system="Be brief.", messages=GRAVITY)
        assert answer.type == "message"
        assert answer.id.startswith("msg_")
        assert answer.model == "smollm2"
        assert answer.content[0].type == "text"
        assert answer.content[0].text
        assert answer.stop_reason in ("end_turn", "max_tokens")
        assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) > 5
        assert 0 < answer.usage.output_tokens <= 20

    def test_a_stream_says_the_same(self, client: Any) -> None:
        asked = {"model": "claude-local", "max_tokens": 20, "messages": GRAVITY, "extra_body": {"temperature": 0}}
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert final.content[0].text == text == client.messages.create(**asked).content[0].text
        assert final.model == "smollm2"
        assert final.usage.output_tokens > 0

    def test_a_stop_sequence(self, client: Any) -> None:
        answer = client.messages.create(model="smollm2", max_tokens=60, stop_sequences=["."], messages=GRAVITY)
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", ".")

    def test_tools_are_offered_and_answered(self, client: Any) -> None:
        tools = [{"name": "weather", "description": "Tells the weather", "input_schema": CITY}]
        used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
        result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
        messages = [*PARIS, {"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
        with client.messages.stream(model="smollm2", max_tokens=16, messages=messages, tools=tools) as stream:
            answer = stream.get_final_message()
        assert answer.content

    def test_tokens_are_counted(self, client: Any) -> None:
        assert client.messages.count_tokens(model="smollm2", messages=GRAVITY).input_tokens > 5

    def test_errors_have_their_types(self, client: Any) -> None:
        import anthropic

        with pytest.raises(anthropic.NotFoundError, match="did you mean smollm2") as caught:
            client.messages.create(model="smollm", max_tokens=5, messages=GRAVITY)
        assert caught.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.ConflictError):
            client.messages.create(model="off", max_tokens=5, messages=GRAVITY)
        with pytest.raises(anthropic.BadRequestError, match="context") as caught:
            client.messages.create(model="smollm2", max_tokens=5, messages=[{"role": "user", "content": "x " * 3000}])
        assert caught.value.body["type"] == "error"
        with pytest.raises(anthropic.BadRequestError, match="messages"):
            client.messages.create(model="smollm2", max_tokens=5, messages=[])

    def test_leaving_ends_the_work(self, client: Any, daemon: Daemon) -> None:
        with client.messages.stream(model="smollm2", max_tokens=1000, messages=GRAVITY) as stream:
            next(iter(stream.text_stream))
        idle(daemon)


class TestOllama:
    @pytest.fixture
    def client(self, url: str) -> Iterator[Any]:
        ollama = pytest.importorskip("ollama", reason="pip install .[clients]")
        with ollama.Client(host=url) as client:
            yield client

    def test_lists(self, client: Any) -> None:
        (entry,) = client.list().models
        assert entry.model == "smollm2"
        assert entry.size > 50e6
        assert entry.details.family == "llama"
        assert entry.details.parameter_size == "134.5M"
        (loaded,) = client.ps().models
        assert (loaded.model, loaded.context_length) == ("smollm2", 1024)
        shown = client.show("smollm2:latest")
        assert shown.modelinfo["general.architecture"] == "llama"
        assert {"completion", "tools", "embedding"} <= set(shown.capabilities)

    def test_a_chat_and_its_stream(self, client: Any) -> None:
        asked: dict[str, Any] = {"model": "smollm2", "messages": GRAVITY, "options": {"temperature": 0, "num_predict": 20}}
        answer = client.chat(**asked)
        assert "ravity" in answer.message.content
        assert answer.done
        assert answer.eval_count <= 20
        assert answer.total_duration >= answer.eval_duration > 0
        pieces = list(client.chat(**asked, stream=True))
        assert "".join(piece.message.content for piece in pieces) == answer.message.content
        assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].done_reason == answer.done_reason

    def test_generating(self, client: Any) -> None:
        raw = client.generate("smollm2", "The capital of France is", raw=True, options={"temperature": 0, "num_predict": 5})
        assert "Paris" in raw.response
        stream = client.generate(
            "gpt-4o-mini", "Say hi", system="Be brief.", stream=True, options={"num_predict": 8, "num_ctx": 99}
        )
        assert list(stream)[-1].done

    def test_a_schema(self, client: Any) -> None:
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
        answer = client.chat("smollm2", [{"role": "user", "content": "Is water wet?"}], format=schema, options={"num_predict": 60})
        assert set(json.loads(answer.message.content)) == {"ok"}

    def test_tools_are_offered_and_answered(self, client: Any) -> None:
        def weather(city: str) -> str:
            """Tells the weather.

            Args:
                city: The city
            """
            return f"sunny in {city}"

        called = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]}
        messages = [*PARIS, called, {"role": "tool", "tool_name": "weather", "content": weather("Paris")}]
        answer = client.chat("smollm2", messages, tools=[weather], options={"num_predict": 16})
        assert answer.message.content or answer.message.tool_calls

    def test_embedding(self, client: Any) -> None:
        both = client.embed("smollm2", ["a cat", "tax law"])
        assert len(both.embeddings) == 2
        assert list(client.embeddings("smollm2", "a cat").embedding) == pytest.approx(list(both.embeddings[0]), abs=0.02)

    def test_errors(self, client: Any) -> None:
        import ollama

        with pytest.raises(ollama.ResponseError, match="did you mean smollm2") as caught:
            client.chat("smollm", GRAVITY)
        assert caught.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="context"):
            list(client.chat("smollm2", [{"role": "user", "content": "x " * 3000}], stream=True))
        with pytest.raises(ollama.ResponseError, match=r"storage\.models_path"):
            client.pull("llama3")

    def test_leaving_ends_the_work(self, client: Any, daemon: Daemon) -> None:
        stream = client.chat("smollm2", GRAVITY, stream=True, options={"num_predict": 1000})
        next(stream)
        stream.close()
        idle(daemon)
