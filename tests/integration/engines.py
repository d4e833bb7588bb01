"""A config with every kind of engine: stand-ins for llama.cpp, vLLM and TGI, a program of one's own, a server elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conformance.processes import STANDINS, Server, free_port, standin, wait_serving
from tests.integration.daemon import Daemon, model, running

KEY = "sk-elsewhere"


def script(name: str) -> list[str]:
    """The command of a stand-in."""
    return [sys.executable, str(STANDINS / f"{name}.py")]


@dataclass(frozen=True)
class Elsewhere:
    """A vLLM that nobody here has started, behind a key."""

    server: Server
    name: str = "far/away"

    @property
    def entry(self) -> dict[str, Any]:
        """What the config says of it."""
        return {"kind": "external", "url": f"http://127.0.0.1:{self.server.port}/v1", "key": KEY}


@contextlib.contextmanager
def elsewhere(folder: Path, port: int | None = None, **knobs: Any) -> Iterator[Elsewhere]:
    """Start it."""
    port = port or free_port()
    source = hub_folder(folder)
    given = ["serve", str(source), "--served-model-name", Elsewhere.name, "--host", "127.0.0.1", "--port", str(port)]
    with standin("vllm_server", **knobs).run([*given, "--api-key", KEY], folder, port) as server:
        yield Elsewhere(wait_serving(server))


def hub_folder(folder: Path) -> Path:
    """A model in the hub's layout as far as its names go."""
    source = folder / "hub-model"
    source.mkdir(exist_ok=True)
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "BF16", "shape": [8, 8], "data_offsets": [0, 128]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    facts = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    (source / "config.json").write_text(json.dumps({**facts, "max_position_embeddings": 4096}))
    return source


_COUNTS = {"prompt_tokens": "/spent/heard", "completion_tokens": "/spent/spoken"}
ODD: dict[str, Any] = {
    "prompt": "/words",
    "messages": {"at": "/dialog", "role": "speaker", "content": "line", "system": "/law"}
    | {"roles": {"user": "human", "assistant": "machine"}},
    "parameters": {"max_tokens": "/knobs/limit", "stop": "/knobs/until", "temperature": "/fixed/0/heat"},
    "body": {"fixed": [{"tone": "calm"}]},
    "answer": {"text": "/results/0/voice", "finish_reason": "/results/0/because", "error": "/problem/text", **_COUNTS},
    "stream": {"framing": "ndjson", "switch": "/drip", "text": "/bit", "finish_reason": "/because", "done": "/over", **_COUNTS},
    "finish_reasons": {"ran out": "length", "said it all": "stop", "met": "stop"},
}
"""The JSON of the stand-in that is like no other, as a config declares it."""


def odd(**changes: Any) -> dict[str, Any]:
    """That engine, with parts of its format changed; None leaves a part out."""
    changed = {name: value for name, value in {**ODD, **changes}.items() if value is not None}
    return {
        "kind": "custom",
        "command": [*script("odd_server"), "--port", "${port}"],
        "health": {"path": "/alive", "ready_status": 204},
        "inference": {"path": "/say", "format": changed},
        "env": {"STANDIN_TOKEN_S": "0.005"},
    }


def engines(cloud: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `backends` of the config."""
    own = {
        "kind": "custom",
        "command": [*script("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}"],
        "health": {"path": "/health", "ready_status": 200},
        "inference": {"path": "/v1", "format": "openai"},
        "env": {"STANDIN_TOKEN_S": "0.005"},
    }
    found = {
        "llamacpp": {"command": script("llama_server")},
        "vllm": {"command": [*script("vllm_server"), "serve"]},
        "tgi": {"command": script("tgi_launcher")},
        "own": own,
        "odd": odd(),
    }
    return {**found, "cloud": dict(cloud)} if cloud else found


def served_by(*names: str, **changes: Any) -> dict[str, Any]:
    """A model that these engines may serve, in this order."""
    sources = {"llamacpp": "model.gguf", "own": "model.gguf", "cloud": Elsewhere.name}
    usual = {"source": "hub-model", "sources": {name: sources[name] for name in names if name in sources}}
    return model(**{**usual, "backends": list(names), "vram": "64MiB", "run": "on-demand", **changes})


def daemon_of(
    folder: Path, models: Mapping[str, Any], cloud: Mapping[str, Any] | None = None, **options: Any
) -> contextlib.AbstractContextManager[Daemon]:
    """A daemon for these models with all engines."""
    hub_folder(folder)
    return running(folder, models, backends=engines(cloud), **options)
