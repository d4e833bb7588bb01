"""Engines with JSON of their own, declared in the config: a program, a server elsewhere, and TGI by its own paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conformance.processes import Server, free_port, standin, until
from tests.integration.daemon import HELLO, Daemon, running
from tests.integration.engines import ODD, hub_folder, odd, script, served_by

SAID = "the night was calm"
POURED = {
    "framing": "sse",
    "path": "/pour",
    "grows": True,
    "text": "/so_far",
    "finish_reason": "/because",
    "error": "/problem/text",
}
COUNTS = {"prompt_tokens": "/spent/heard", "completion_tokens": "/spent/spoken"}
NAMES = ("lines", "events", "streams-only", "whole-only", "far", "tgi-by-hand")
STREAMED = tuple(name for name in NAMES if name != "whole-only")


def tgi_by_hand(folder: Path) -> dict[str, Any]:
    """TGI by `/generate` and `/generate_stream`, as an operator would declare it who has no adapter for it."""
    command = [*script("tgi_launcher"), "--model-id", "${source}", "--hostname", "127.0.0.1", "--port", "${port}"]
    command += ["--prometheus-port", "${port}", "--shard-uds-path", str(folder / "shard-${port}"), "--master-port", "${port}"]
    turns = {"system": "<s>${text}</s>", "user": "<u>${text}</u>", "assistant": "<a>${text}</a>", "open": "<a>"}
    shape = {
        "prompt": "/inputs",
        "turns": turns,
        "parameters": {"max_tokens": "/parameters/max_new_tokens", "stop": "/parameters/stop", "seed": "/parameters/seed"},
        "body": {"parameters": {"details": True}},
        "answer": {"text": "/generated_text", "finish_reason": "/details/finish_reason", "error": "/error"},
        "stream": {"framing": "sse", "path": "/generate_stream", "text": "/token/text"}
        | {"finish_reason": "/details/finish_reason", "error": "/error"},
        "finish_reasons": {"eos_token": "stop", "stop_sequence": "stop"},
    }
    return {"kind": "custom", "command": command, "inference": {"path": "/generate", "format": shape}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("own-json")
    hub_folder(folder)
    port = free_port()
    with standin("odd_server").run(["--port", str(port)], folder, port) as server:
        wait_serving_alive(server)
        far = {key: value for key, value in odd().items() if key not in ("command", "env")}
        backends = {
            "lines": odd(),
            "events": odd(stream=POURED | COUNTS),
            "streams-only": odd(answer=None, stream={**ODD["stream"], "error": "/problem/text"}),
            "whole-only": odd(stream=None, messages=None, turns=dict.fromkeys(("system", "user", "assistant"), "${text} ")),
            "cut": odd() | {"env": {"STANDIN_CUT_AFTER": "2"}},
            "far": {**far, "kind": "external", "url": f"http://127.0.0.1:{port}"},
            "tgi-by-hand": tgi_by_hand(folder),
        }
        models = {f"on-{name}": served_by(name, source="hub-model") for name in backends}
        with running(folder, models, backends=backends) as found:
            yield found


def wait_serving_alive(server: Server) -> None:
    until(lambda: server.probe("/alive").status == 204, "it is alive", 30)


@pytest.mark.parametrize("name", NAMES)
def test_openais_client_is_served_whole_and_streaming(daemon: Daemon, name: str) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key="none") as client:
        asked: Any = {"model": f"on-{name}", "messages": HELLO, "max_tokens": 4}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == SAID
        assert (whole.choices[0].finish_reason, whole.model) == ("length", f"on-{name}")
        assert whole.id
        assert whole.created > 1_700_000_000
        chunks = list(client.chat.completions.create(**asked, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == SAID
        assert sum(bool(piece) for piece in pieces) == (1 if name == "whole-only" else 4)
        assert chunks[0].id == chunks[-1].id
        text = client.completions.create(model=f"on-{name}", prompt="one two three", max_tokens=4)
        assert text.choices[0].text.strip() == SAID
        if name != "tgi-by-hand":
            assert text.usage
            assert (text.usage.prompt_tokens, text.usage.completion_tokens) == (3, 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_has_a_place_reaches_the_engine(daemon: Daemon, name: str) -> None:
    for stream in (False, True):
        reply = daemon.chat(f"on-{name}", tokens=9, stop="calm", stream=stream)
        assert reply.status == 200, reply.body
        if stream:
            events = [json.loads(line[6:]) for line in reply.body.decode().splitlines() if line.startswith("data: {")]
            said = "".join(each["delta"].get("content") or "" for event in events for each in event["choices"])
            reasons = [each["finish_reason"] for event in events for each in event["choices"] if each["finish_reason"]]
        else:
            (choice,) = reply.json()["choices"]
            said, reasons = choice["message"]["content"], [choice["finish_reason"]]
        assert said.removesuffix(" calm") == "the night was"
        assert reasons == ["stop"]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_has_no_place_for_is_refused(daemon: Daemon, name: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for stream in (False, True):
        refused = daemon.chat(f"on-{name}", tools=[tool], stream=stream)
        assert refused.status == 400, refused.body
        assert "does not offer tools" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "unsupported_capability"
    no_vectors = daemon.post("/v1/embeddings", {"model": f"on-{name}", "input": "x"})
    assert no_vectors.status == 400
    assert "does not offer embeddings" in no_vectors.json()["error"]["message"]
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    assert daemon.chat(f"on-{name}", messages=[{"role": "user", "content": picture}]).status == 400


@pytest.mark.parametrize("name", NAMES)
def test_its_own_refusal_is_told_in_its_words(daemon: Daemon, name: str) -> None:
    for stream in (False, True):
        refused = daemon.chat(f"on-{name}", tokens=60_000, stream=stream)
        if name == "tgi-by-hand" and stream:  # it tells errors within a stream that it has begun
            assert refused.status == 200
            (event,) = [json.loads(line[6:]) for line in refused.body.decode().splitlines() if line.startswith('data: {"error')]
            assert "max_new_tokens" in event["error"]["message"]
            assert "[DONE]" not in refused.body.decode()
        else:
            assert refused.status == 400, refused.body
            message = refused.json()["error"]["message"]
            assert "knobs.limit is out of range" in message or "max_new_tokens" in message


def test_a_stream_that_was_cut_is_told_and_never_looks_whole(daemon: Daemon) -> None:
    broken = daemon.chat("on-cut", stream=True)
    lines = [json.loads(line[6:]) for line in broken.body.decode().splitlines() if line.startswith("data: {")]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in lines[:-1]) == "the night"
    assert "ended before the answer did" in lines[-1]["error"]["message"]
    assert "[DONE]" not in broken.body.decode()
    assert daemon.chat("on-cut").status == 200


def test_its_tokens_are_counted_like_anybodys(daemon: Daemon) -> None:
    def counted() -> float:
        lines = daemon.request("GET", "/metrics").body.decode().splitlines()
        named = [line for line in lines if line.startswith("offloadd_tokens_total{")]
        (found,) = [line for line in named if 'model="on-events"' in line and 'kind="completion"' in line]
        return float(found.split()[-1])

    daemon.chat("on-events")
    before = counted()
    daemon.chat("on-events", tokens=3)
    daemon.chat("on-events", tokens=3, stream=True)
    until(lambda: counted() == before + 6, "both are counted", 10)


def test_by_its_own_path_it_answers_in_its_own_words(daemon: Daemon) -> None:
    reply = daemon.post("/upstream/on-lines/say", {"words": "x", "fixed": [{"tone": "calm"}], "knobs": {"limit": 2}})
    assert reply.json()["results"][0]["voice"] == "the night"


def test_its_format_may_change_while_it_runs(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    models = {"a": served_by("own", source="hub-model")}
    with running(tmp_path, models, backends={"own": odd(prompt=None)}) as daemon:
        assert daemon.chat().status == 200
        first = daemon.pid()
        asked = {"model": "a", "prompt": "x", "max_tokens": 2}
        refused = daemon.post("/v1/completions", asked)
        assert refused.status == 400
        assert "in the config: backends.own.inference.format.prompt" in refused.json()["error"]["message"]
        daemon.apply(models, backends={"own": odd()})
        assert daemon.post("/v1/completions", asked).json()["choices"][0]["text"] == "the night"
        assert daemon.pid() == first
