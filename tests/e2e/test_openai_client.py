"""The official `openai` client, unmodified, against offloadd and the real llama-server."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.conformance.servers import HOST, free_port
from tests.e2e.conftest import Real
from tests.integration.daemon import Daemon, running

ASK = [{"role": "user", "content": "What is gravity?"}]


@pytest.fixture(scope="module")
def daemon(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    models = {
        "smollm2": real.model(aliases=["gpt-4o-mini"]),
        "embedder": real.model(run="on-demand", context=512, llamacpp={"embeddings": True, "pooling": "mean"}),
        "off": real.model(run="never"),
        "broken": real.model(source="nowhere.gguf"),
    }
    with running(tmp_path_factory.mktemp("openai"), models, llamacpp=real.llamacpp) as running_daemon:
        running_daemon.wait_for("smollm2")
        yield running_daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{HOST}:{daemon.port}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "embedder", "off", "broken"]
    assert client.models.retrieve("smollm2").owned_by == "offloadd"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ASK, max_tokens=20, temperature=0)
    assert "ravity" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage
    assert answer.usage.completion_tokens


def test_streaming_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="gpt-4o-mini", messages=ASK, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert "ravity" in text
    assert chunks[-1].usage
    plain = client.chat.completions.create(model="smollm2", messages=ASK, max_tokens=20, temperature=0)
    assert plain.choices[0].message.content == text


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=5, temperature=0)
    assert "Paris" in answer.choices[0].text
    pieces = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=5, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == answer.choices[0].text


def test_embeddings_start_their_model(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="embedder", input=["a cat", "a kitten", "tax law"])
    cat, kitten, law = (entry.embedding for entry in found.data)
    assert math.isclose(math.hypot(*cat), 1, rel_tol=1e-3)
    assert likeness(cat, kitten) > likeness(cat, law)


def likeness(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("smollm", openai.NotFoundError, "model_not_found"),
        ("off", openai.ConflictError, "model_disabled"),
        ("broken", openai.InternalServerError, "model_failed"),
    ],
)
def test_errors_have_their_types(client: openai.OpenAI, model: str, error: type[openai.APIStatusError], code: str) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=ASK)
    assert caught.value.code == code
    assert caught.value.request_id


def test_what_the_server_refuses_is_its_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context size"):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "x " * 3000}])


def test_an_answer_that_breaks_off_raises(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as alone:
        pid = alone.pid()
        with openai.OpenAI(base_url=f"http://{HOST}:{alone.port}/v1", api_key="unused", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="a", messages=ASK, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="was lost"):
                list(stream)


def test_no_daemon_is_a_connection_error() -> None:
    client = openai.OpenAI(base_url=f"http://{HOST}:{free_port()}/v1", api_key="unused", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()
