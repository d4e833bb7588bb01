"""Clients as people have them, unmodified, against offloadd and the real llama-server: one daemon, one server for them all."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
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


@contextlib.contextmanager
def chat_only(daemon: Daemon) -> Iterator[str]:
    """A server before the daemon that passes on its chat completions and its list of models, and has nothing else; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.pass_on(None)

        def do_POST(self) -> None:
            self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

        def pass_on(self, body: bytes | None) -> None:
            if self.path not in ("/v1/models", "/v1/chat/completions"):
                self.send_error(404)
                return
            connection = daemon.connect()
            connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            with contextlib.closing(connection), contextlib.suppress(ConnectionError):
                while piece := answer.read1():
                    self.wfile.write(piece)

    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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

    def test_keep_alive_unloads_and_empty_requests_load(self, real: Real, tmp_path: Path) -> None:
        ollama = pytest.importorskip("ollama", reason="pip install .[clients]")
        models = {"a": real.model(run="on-demand", idle_timeout="10m")}
        with (
            running(tmp_path, models, llamacpp=real.llamacpp) as alone,
            ollama.Client(host=f"http://{HOST}:{alone.port}") as client,
        ):
            assert client.generate("a", keep_alive="30m").done_reason == "load"
            alone.wait_for("a")
            (loaded,) = client.ps().models
            assert loaded.expires_at.timestamp() - time.time() > 20 * 60
            assert client.chat("a", [], keep_alive=0).done_reason == "unload"
            alone.wait_for("a", "off")
            assert client.ps().models == []
            client.generate("a", "hi", keep_alive=0, options={"num_predict": 4})
            alone.wait_for("a", "off")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its client is from the days of another pydantic
class TestTgi:
    @pytest.fixture
    def client(self, url: str) -> Any:
        tgi = pytest.importorskip("text_generation", reason="pip install .[clients]")
        return tgi.Client(f"{url}/tgi/smollm2", timeout=60)

    def test_generating(self, client: Any) -> None:
        answer = client.generate("The capital of France is", max_new_tokens=5)
        assert "Paris" in answer.generated_text
        assert answer.details.generated_tokens == 5
        assert answer.details.finish_reason == "length"
        assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
        assert all(token.id > 0 and token.logprob <= 0 for token in answer.details.tokens)

    def test_a_stream_says_the_same(self, client: Any) -> None:
        whole = client.generate("The capital of France is", max_new_tokens=5, return_full_text=True)
        events = list(client.generate_stream("The capital of France is", max_new_tokens=5))
        text = "".join(event.token.text for event in events if not event.token.special)
        assert events[-1].generated_text == text
        assert whole.generated_text == "The capital of France is" + text

    def test_errors_have_their_types(self, client: Any, url: str) -> None:
        import text_generation
        from text_generation.errors import NotFoundError, ValidationError

        with pytest.raises(ValidationError, match="watermarking"):
            client.generate("x", watermark=True)
        with pytest.raises(ValidationError, match="context"):
            client.generate("x " * 3000)
        with pytest.raises(NotFoundError, match="did you mean"):
            text_generation.Client(f"{url}/tgi/smollm").generate("x")

    def test_hugging_face_s_own_client(self, url: str, daemon: Daemon) -> None:
        hub = pytest.importorskip("huggingface_hub", reason="pip install .[clients]")
        with_path = hub.InferenceClient(f"{url}/tgi/smollm2")
        text = with_path.text_generation("The capital of France is", max_new_tokens=5)
        assert "Paris" in text
        assert "".join(with_path.text_generation("The capital of France is", max_new_tokens=5, stream=True)) == text
        details = with_path.text_generation("The capital of France is", max_new_tokens=5, details=True)
        assert details.details.generated_tokens == 5
        chat = hub.InferenceClient(base_url=f"{url}/v1", api_key="unused")
        answer = chat.chat_completion(GRAVITY, model="smollm2", max_tokens=8, temperature=0)
        assert answer.choices[0].message.content
        stream = chat.chat_completion(GRAVITY, model="smollm2", max_tokens=8, temperature=0, stream=True)
        pieces = [choice.delta.content or "" for event in stream for choice in event.choices]
        assert "".join(pieces) == answer.choices[0].message.content
        with pytest.raises(hub.errors.HfHubHTTPError, match="did you mean"):
            chat.chat_completion(GRAVITY, model="smollm")
        idle(daemon)


class TestOpenAi:
    """What tests/e2e/test_openai_client.py does not have: responses, several choices, tools, leaving."""

    @pytest.fixture
    def client(self, url: str) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            yield client

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="gpt-4o-mini", input="What is gravity?", max_output_tokens=12, temperature=0)
        assert answer.output_text
        assert (answer.status, answer.model) == ("incomplete", "smollm2")
        with client.responses.stream(model="smollm2", input="What is gravity?", max_output_tokens=12, temperature=0) as stream:
            events = list(stream)
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.output_text == answer.output_text
        with pytest.raises(openai.BadRequestError, match="no responses are stored"):
            client.responses.retrieve("resp_1")

    def test_tools_of_a_response(self, client: openai.OpenAI) -> None:
        tools: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": False}]
        called = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'}
        given = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
        asked: Any = [*PARIS, called, given]
        assert client.responses.create(model="smollm2", input=asked, tools=tools, max_output_tokens=16).output

    def test_responses_of_a_server_that_has_only_chat(self, client: openai.OpenAI, daemon: Daemon, tmp_path: Path) -> None:
        """They say what the real server's own say, since its chat does."""
        with chat_only(daemon) as url:
            backends = {"far": {"kind": "external", "url": url}}
            models = {"far": {"source": "none", "backends": ["far"], "sources": {"far": "smollm2"}, "run": "always"}}
            with running(tmp_path, models, backends=backends) as second:
                second.wait_for("far")
                with openai.OpenAI(base_url=f"http://{HOST}:{second.port}/v1", api_key="unused", max_retries=0) as far:
                    asked: dict[str, Any] = {"input": "What is gravity?", "max_output_tokens": 12, "temperature": 0}
                    own, made = client.responses.create(model="smollm2", **asked), far.responses.create(model="far", **asked)
                    assert made.output_text == own.output_text != ""
                    assert made.usage
                    assert own.usage
                    assert (made.status, made.usage.output_tokens) == (own.status, own.usage.output_tokens)
                    assert made.usage.input_tokens == own.usage.input_tokens
                    with far.responses.stream(model="far", **asked) as stream:
                        events = list(stream)
                    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == own.output_text
                    assert events[-1].type == "response.incomplete"
                    assert events[-1].response.output_text == own.output_text
                    tools: Any = [{"type": "function", "name": "weather", "parameters": CITY, "strict": False}]
                    called = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Paris"}'}
                    given = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
                    talk: Any = [*PARIS, called, given]
                    assert far.responses.create(model="far", input=talk, tools=tools, max_output_tokens=16).output
                    left = far.responses.create(model="far", input="What is gravity?", max_output_tokens=1000, stream=True)
                    next(iter(left))
                    left.close()
        idle(daemon)

    def test_two_choices_are_counted(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="smollm2", messages=GRAVITY, n=2, max_tokens=4)
        assert len(answer.choices) == 2
        assert answer.usage
        assert answer.usage.completion_tokens == 8
        options: Any = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(
                model="smollm2", messages=GRAVITY, n=2, max_tokens=4, stream=True, stream_options=options
            )
        )
        assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [8]
        assert chunks[-1].usage

    def test_tools(self, client: openai.OpenAI) -> None:
        tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
        answer = client.chat.completions.create(model="smollm2", messages=PARIS, tools=tools, max_tokens=16)
        assert answer.choices[0].message

    def test_what_it_cannot_do_is_named(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match=r"llamacpp\.reranking: true") as caught:
            client.post("/rerank", body={"model": "smollm2", "query": "x", "documents": ["y"]}, cast_to=object)
        assert caught.value.code == "unsupported_capability"
        with pytest.raises(openai.BadRequestError, match="does not offer speech"):
            client.audio.speech.create(model="smollm2", voice="alloy", input="x")
        with pytest.raises(openai.BadRequestError, match="transcription"):
            client.audio.transcriptions.create(model="gpt-4o-mini", file=("a.wav", b"RIFF" * 1000))

    def test_leaving_ends_the_work(self, client: openai.OpenAI, daemon: Daemon) -> None:
        stream = client.chat.completions.create(model="smollm2", messages=GRAVITY, max_tokens=1000, stream=True)
        next(iter(stream))
        stream.close()
        idle(daemon)

    @pytest.mark.filterwarnings("ignore")  # it brings many of its own
    def test_litellm_as_client(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network for prices
        litellm = pytest.importorskip("litellm", reason="pip install .[clients]")
        given = {"api_base": f"{url}/v1", "api_key": "unused", "max_tokens": 12, "temperature": 0, "messages": GRAVITY}
        whole = litellm.completion("openai/smollm2", **given)
        pieces = litellm.completion("openai/smollm2", **given, stream=True)
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert text == whole.choices[0].message.content
        through_anthropic = litellm.completion("anthropic/smollm2", **{**given, "api_base": url})
        assert through_anthropic.choices[0].message.content
        through_ollama = litellm.completion("ollama_chat/smollm2", **{**given, "api_base": url})
        assert through_ollama.choices[0].message.content
        with pytest.raises(litellm.NotFoundError, match="did you mean"):
            litellm.completion("openai/smollm", **given)
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion("openai/smollm2", **{**given, "messages": [{"role": "user", "content": "x " * 3000}]})


_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2] + "/v1", apiKey: "unused", maxRetries: 0});
const messages = [{role: "user", content: "What is gravity?"}];
const asked = {model: "smollm2", messages, max_tokens: 12, temperature: 0};
const out = {};
out.models = [];
for await (const model of client.models.list()) out.models.push(model.id);
out.text = (await client.chat.completions.create(asked)).choices[0].message.content;
out.streamed = "";
for await (const chunk of await client.chat.completions.create({...asked, stream: true}))
  out.streamed += chunk.choices[0]?.delta?.content ?? "";
const tools = [{type: "function", function: {name: "weather", parameters: {type: "object", properties: {city: {type: "string"}}}}}];
out.tools = (await client.chat.completions.create({...asked, tools})).choices.length;
try { await client.chat.completions.create({...asked, model: "smollm"}); } catch (error) { out.error = [error.status, error.code]; }
const left = await client.chat.completions.create({...asked, max_tokens: 1000, stream: true});
for await (const chunk of left) { left.controller.abort(); break; }
console.log(JSON.stringify(out));
"""


def test_openais_javascript_client(url: str, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not at hand")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "dependencies": {"openai": ">=5"}}')
    (folder / "ask.mjs").write_text(_SCRIPT)
    installed = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, timeout=100
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr.decode(errors='replace')[-300:]}")
    ran = subprocess.run([node, "ask.mjs", url], cwd=folder, capture_output=True, timeout=60)
    assert ran.returncode == 0, ran.stderr.decode(errors="replace")
    out = json.loads(ran.stdout)
    assert out["models"] == ["smollm2", "off"]
    assert out["streamed"] == out["text"] != ""
    assert out["tools"] == 1
    assert out["error"] == [404, "model_not_found"]
    idle(daemon)
