"""The stand-in held to recordings of the real llama-server: the same requests, and answers of the same shape."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName
from tests.conformance import recordings
from tests.conformance.servers import LLAMACPP, STANDIN, Server, free_port, tiny_gguf, until
from tests.conformance.shared import shared

CHAT = "/v1/chat/completions"
SPEC = ModelSpec(name=ModelName("m"), source="m", backends=(LLAMACPP,))


@dataclass(frozen=True, slots=True)
class Setting:
    """A way the server was run when these captures were taken."""

    captures: str
    args: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    busy: bool = False
    """Four streams run and two wait."""


PLAIN = """
    accept-encoding-gzip.json accepted-bad-role.json accepted-messages-empty.json accepted-stream-options-without-stream.json
    accepted-temperature-99.json accepted-temperature-negative.json accepted-top-p-5.json accepted-unknown-param.json
    accepted-wrong-content-type.json api-tags.json chat-completion-content-parts.json chat-completion-max-completion-tokens.json
    chat-completion-max-tokens-0.json chat-completion-max-tokens-1-stream.sse chat-completion-max-tokens-1.json
    chat-completion-n2.json chat-completion-n5-more-than-slots.json chat-completion-noprefix.json chat-completion-stop-stream.sse
    chat-completion-stop.json chat-completion-stream-usage.sse chat-completion-stream.sse chat-completion-utf8.sse
    chat-completion.json chat-input-tokens.json client-connection-close.json completion-native-stream.sse completion-native.json
    completion-openai-stream-usage.sse completion-openai-stream.sse completion-openai.json cors-error-with-origin.json
    cors-get-with-origin.json cors-preflight.txt double-slash.json embedding-native-not-enabled.json embeddings-not-enabled.json
    encoded-path.json error-empty-body.json error-form-content-type.json error-image.json error-invalid-temperature-string.json
    error-json-array.json error-logprobs-top-without.json error-malformed-json-stream.json error-malformed-json.json
    error-max-tokens-negative.json error-max-tokens-string.json error-messages-not-list.json error-missing-messages.json
    error-missing-prompt.json error-n-0.json error-stream-string.json error-unknown-path-post.json error-unknown-path.json
    error-wrong-method-delete.json error-wrong-method-get-chat.json error-wrong-method-patch.json
    error-wrong-method-post-models.json error-wrong-method-put.json head-health.json health-ready.json load.json
    lora-adapters.json max-tokens-over-context.json metrics-after-work.txt models-load-not-router.json models-sse-not-router.json
    models.json no-content-type.json no-model-field.json props-post-disabled.json props.json query-string.json
    rerank-not-enabled.json root-ui.txt tokenize-pieces.json tokenize.json trailing-slash.json
    unknown-model-name.json v1-health.json v1-models-one.json v1-models.json v1-rerank-not-enabled.json v1-tokenize.json
    version.json
"""
LOADING = """
    chat-completion-loading.json health-loading.json metrics-loading.json models-loading.json options-loading.txt
    props-loading.json root-loading.txt slots-loading.json unknown-path-loading.json v1-health-loading.json
"""
KEY = """
    apikey-basic-chat.json apikey-lowercase-bearer-chat.json apikey-missing-chat.json apikey-missing-get-health.json
    apikey-missing-get-metrics.json apikey-missing-get-nope.json apikey-missing-get-props.json apikey-missing-get-slots.json
    apikey-missing-get-tokenize.json apikey-missing-get-v1-health.json apikey-missing-get-v1-models.json apikey-missing-get.txt
    apikey-missing-options.txt apikey-missing-stream.json apikey-wrong-chat.json apikey-x-api-key-chat.json
"""
SETTINGS = {
    "plain": Setting(PLAIN, "--metrics --slots"),
    "fresh": Setting("slots-idle.json slots-idle-fail-on-no-slot.json metrics-idle.txt", "--metrics --slots"),
    "loading": Setting(LOADING, "--metrics --slots", {"STANDIN_NEVER_READY": "1"}),
    "busy": Setting(
        "health-busy.json metrics-busy.txt slots-busy.json slots-busy-fail-on-no-slot.json",
        "--metrics",
        {"STANDIN_TOKEN_S": "5"},
        True,
    ),
    "switched off": Setting("metrics-disabled.json slots-disabled.json", "--no-slots"),
    "aliases": Setting("alias-models.json alias-chat.json", "--alias smol,smollm2:latest --tags a,b --no-slots"),
    "embeddings": Setting(
        "embeddings-error-empty-input.json embeddings-error-missing-input.json embeddings-server-chat.json"
        " embeddings-server-models.json embeddings-server-rerank.json",
        "--embeddings --pooling mean",
    ),
    "key": Setting(KEY, "--metrics --slots", {"LLAMA_API_KEY": "sk-test-1"}),
    "reranking": Setting("rerank.json", "--reranking"),
}
CASES = [(name, capture) for name, setting in SETTINGS.items() for capture in setting.captures.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared("recordings/llamacpp")
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    """One stand-in per setting, started when its first capture is played."""
    started: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [server.kill() for server in started.values()])
        yield started


def start(setting: Setting, folder: Path) -> Server:
    port = free_port()
    model = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.write_bytes(tiny_gguf())
    given = f"--host 127.0.0.1 --port {port} -m {model} -c 2048 -np 4 {setting.args}".split()
    log_path = folder / f"{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([sys.executable, str(STANDIN), *given], env=dict(setting.env), stderr=log)
    server = Server(process, port, SPEC, log_path)
    until(lambda: server.probe("/health").status is not None, "it answers")
    return server


def occupy(server: Server) -> None:
    """Fill the four slots and let two more requests wait; the connections stay open until the server is killed."""
    asked = {"messages": [{"role": "user", "content": "story"}], "max_tokens": 200, "stream": True}
    open_clients = [server.begin(CHAT, asked) for _ in range(6)]
    until(lambda: server.metric("requests_deferred") == 2, "two requests wait")
    server.clients.extend(open_clients)


@pytest.mark.parametrize(("name", "capture"), CASES, ids=[capture for _, capture in CASES])
def test_answers_as_recorded(name: str, capture: str, folder: Path, servers: dict[str, Server]) -> None:
    setting = SETTINGS[name]
    if name not in servers:
        servers[name] = start(setting, folder)
        if setting.busy:
            occupy(servers[name])
    recorded = recordings.load(shared("recordings/llamacpp") / capture)
    answered = recordings.replay(recorded, servers[name].port)
    assert recordings.comparable(answered) == recordings.comparable(recorded.answer)


def test_enough_is_compared() -> None:
    assert len(CASES) >= 100
    assert len({capture for _, capture in CASES}) == len(CASES)
