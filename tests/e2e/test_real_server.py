"""The real llama-server under offloadd: config edits, kills, bad files, clients that leave, and answers as the server's own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conformance.servers import HOST, until
from tests.e2e.conftest import Real
from tests.integration.daemon import CHAT, Daemon, alive, chat, running

LONG = {"tokens": 800, "ignore_eos": True}
"""An answer that takes some seconds."""


@pytest.fixture(scope="module")
def shared(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("real"), {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        daemon.wait_for("a")
        yield daemon


# --- what an operator does ------------------------------------------------------------------------------------------------------


def test_a_second_model_comes_and_goes_beside_the_first(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        first = daemon.pid("a")
        with daemon.stream("a", 250, ignore_eos=True) as stream:
            stream.skip(2)
            daemon.write({"a": real.model(), "b": real.model()})
            daemon.hup()
            until(lambda: daemon.names() == ["a", "b"], "b is on the list")
            second = daemon.pid("b")
            assert daemon.chat("b", 2).status == 200
            daemon.write({"a": real.model()})
            daemon.hup()
            until(lambda: not alive(second), "b has ended")
            events = list(stream)
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert daemon.pids("a") == [first]
        daemon.term()
        assert daemon.exit() == 0
        assert not daemon.leftovers()
        assert not alive(first)


def test_killed_in_the_middle_of_requests(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        old = daemon.pid()
        plain = daemon.chat_soon("a", **{**LONG, "tokens": 60})
        with daemon.stream("a", **LONG) as stream:
            stream.skip(3)
            until(lambda: daemon.load() == 2, "both run")
            killed = time.monotonic()
            os.kill(old, signal.SIGKILL)
            events = list(stream)
            assert time.monotonic() - killed < 0.5
            assert events[-1]["error"]["code"] == "backend_lost"
            until(lambda: any(pid != old for pid in daemon.pids()), "a new process", 1)
            assert time.monotonic() - killed < 1
        # Its client has seen nothing of an answer yet, so the new process begins it anew.
        assert plain.result().status == 200
        assert daemon.chat("a", 2).status == 200
        assert daemon.pid() != old


def test_killed_while_loading(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model(run="on-demand")}, llamacpp=real.llamacpp) as daemon:
        asked = daemon.chat_soon("a", 2)
        (old,) = until(daemon.pids, "it starts")
        assert daemon.state() in ("starting", "loading")
        os.kill(old, signal.SIGKILL)
        until(lambda: any(pid != old for pid in daemon.pids()), "a new process", 1)
        assert asked.result().status == 200
        assert daemon.launches() == 2


def test_bad_files_end_in_failed_with_a_reason(real: Real, tmp_path: Path) -> None:
    whole = real.gguf.read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.gguf").write_bytes(b"\x00" * 4096)
    models = {name: real.model(source=f"{name}.gguf") for name in ("half", "noise", "missing")}
    with running(tmp_path, models, llamacpp=real.llamacpp) as daemon:
        expected = {"half": "truncated", "noise": "not a whole GGUF file", "missing": "does not exist"}
        for name, text in expected.items():
            found = daemon.wait_for(name, "failed")
            assert text in found["reason"]
            assert found["hint"]
            assert daemon.chat(name).status == 503
        assert [daemon.launches(name) for name in expected] == [1, 1, 0]
        (tmp_path / "missing.gguf").symlink_to(real.gguf)
        daemon.wait_for("missing", within_s=8)


def test_sigterm_during_a_stream(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 100, ignore_eos=True) as stream:
            stream.skip(2)
            daemon.term()
            assert list(stream)[-1] == "[DONE]"
        assert daemon.exit() == 0
        assert not alive(pid)


def test_a_second_sigterm_does_not_wait_for_the_server_to_mind_its_clients(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        daemon.pid()
        with daemon.stream("a", **LONG) as stream:
            stream.skip(2)
            daemon.term()
            until(lambda: "stopping: no new requests" in daemon.log, "it drains")
            daemon.term()
            assert list(stream)[-1]["error"]["code"] == "backend_lost"
            assert daemon.exit(5) == 0


# --- clients that leave ---------------------------------------------------------------------------------------------------------


def busy_slots(daemon: Daemon) -> int:
    return sum(slot["is_processing"] for slot in daemon.get("/upstream/a/slots"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_slot(shared: Daemon, stream: bool) -> None:
    connection = shared.begin(CHAT, chat("a", 900, ignore_eos=True, stream=stream))
    until(lambda: busy_slots(shared) == 1, "it runs")
    connection.close()
    until(lambda: busy_slots(shared) == 0, "the slot is free", 1)
    assert shared.load() == 0


def test_a_client_of_inference_that_leaves_frees_the_slot(shared: Daemon) -> None:
    connection = shared.begin("/inference", {"model": "a", "prompt": "Once", "max_tokens": 900, "ignore_eos": True})
    until(lambda: busy_slots(shared) == 1, "it runs")
    connection.close()
    until(lambda: busy_slots(shared) == 0, "the slot is free", 1)


# --- answers --------------------------------------------------------------------------------------------------------------------

GRAVITY = {"messages": [{"role": "user", "content": "What is gravity?"}]}
SKY = {"prompt": "The sky is"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, GRAVITY),
        (CHAT, {**GRAVITY, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {**GRAVITY, "stop": ["is"]}),
        (CHAT, {**GRAVITY, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 40}),
        (CHAT, {**GRAVITY, "response_format": {"type": "json_object"}}),
        (CHAT, {**GRAVITY, "max_tokens": 0}),
        (CHAT, {**GRAVITY, "timings_per_token": True}),
        (CHAT, {**GRAVITY, "stream": None, "stream_options": None}),
        ("/v1/completions", SKY),
        ("/v1/completions", {**SKY, "logprobs": 2}),
        ("/v1/completions", {**SKY, "echo": True}),
        ("/v1/completions", {"prompt": ["The sky is", "The sea is"]}),
        ("/v1/completions", {"prompt": ""}),
    ],
)
def test_a_plain_answer_is_the_servers_own(shared: Daemon, path: str, body: dict[str, Any]) -> None:
    """Though it was fetched as a stream: field by field the same, save what no two answers share."""
    asked = {"model": "a", "temperature": 0, "seed": 1, "cache_prompt": False, "max_tokens": 12, **body}
    through = shared.post(path, asked)
    assert (through.status, settled(through.json())) == direct(shared, path, asked)


@pytest.mark.parametrize("body", [{"messages": [{"role": "user", "content": "x " * 2000}]}, {}])
def test_a_refusal_keeps_the_servers_words(shared: Daemon, body: dict[str, Any]) -> None:
    """In OpenAI's shape, in which the server leaves out a part."""
    through = shared.post(CHAT, {"model": "a", **body})
    status, said = direct(shared, CHAT, body)
    error = through.json()["error"]
    assert (through.status, error["message"]) == (status, said["error"]["message"])
    assert set(error) >= {"message", "type", "code", "param"}
    assert through.headers["X-Offloadd-Instance"] == "a-1"


def test_nobody_passes_by_the_daemon(shared: Daemon) -> None:
    """The server wants a key that was made for this launch, which only its own user can read."""
    (instance,) = shared.look()["instances"]
    with contextlib.closing(http.client.HTTPConnection(HOST, instance["port"], timeout=60)) as connection:
        connection.request("GET", "/slots")
        assert connection.getresponse().status == 401
    key = key_of(instance["pid"])
    assert len(key) >= 32
    assert key not in " ".join(psutil.Process(instance["pid"]).cmdline())
    assert key not in shared.log + shared.request("GET", "/models").body.decode()


def key_of(pid: int) -> str:
    return psutil.Process(pid).environ()["LLAMA_API_KEY"]


def test_several_choices_are_counted(shared: Daemon) -> None:
    """The server's own plain answer counts the tokens of the first choice alone."""
    asked = {"model": "a", "temperature": 0, "seed": 1, "cache_prompt": False, "max_tokens": 12, **GRAVITY, "n": 2}
    through = settled(shared.post(CHAT, asked).json())
    status, said = direct(shared, CHAT, asked)
    assert (status, through["choices"]) == (200, said["choices"])
    assert through["usage"]["completion_tokens"] == 2 * said["usage"]["completion_tokens"] == 24


def direct(daemon: Daemon, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    (instance,) = daemon.look()["instances"]
    with contextlib.closing(http.client.HTTPConnection(HOST, instance["port"], timeout=60)) as connection:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key_of(instance['pid'])}"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, settled(json.loads(response.read()))


def settled(answer: dict[str, Any]) -> dict[str, Any]:
    """What two answers to one request have in common. Tool calls have random ids too."""
    kept = {key: value for key, value in answer.items() if key not in ("id", "created", "timings")}
    for choice in kept.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls") or ():
            assert call.pop("id")
    return kept
