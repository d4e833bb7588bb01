"""The real llama-server through the byte path: many streams at once, whole and in order, and clients that leave at their worst."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.e2e.conftest import Real
from tests.integration.daemon import CHAT, Daemon, chat, running

STREAMS = int(os.environ.get("STREAMS", "24"))
"""So many at once; 500 take some minutes on two cores."""
TOKENS = 6
PARALLEL = 4


@pytest.fixture(scope="module")
def daemon(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    # A small batch: between two of them the server answers /slots.
    settings = real.model(
        parallel=PARALLEL, context=4096, args=["--batch-size", "64", "--metrics"], queue={"max_waiting": 1000, "max_wait": "20m"}
    )
    with running(tmp_path_factory.mktemp("streams"), {"a": settings}, llamacpp=real.llamacpp) as running_daemon:
        running_daemon.wait_for("a", within_s=60)
        yield running_daemon


def busy(daemon: Daemon) -> int:
    return sum(slot["is_processing"] for slot in daemon.get("/upstream/a/slots"))


def test_many_streams_at_once_are_whole_and_in_order(daemon: Daemon) -> None:
    asked: dict[str, Any] = {"ignore_eos": True, "timings_per_token": True, "stream_options": {"include_usage": True}}
    # All are asked before the first is read: those that must wait are answered with signs of life meanwhile.
    streams = [daemon.stream("a", TOKENS, **asked) for _ in range(min(STREAMS, PARALLEL))]
    waiting = [daemon.begin(CHAT, chat("a", TOKENS, stream=True, **asked)) for _ in range(STREAMS - len(streams))]
    whole = 0
    for stream in streams:
        with stream:
            check(list(stream))
        whole += 1
    for connection in waiting:
        response = connection.getresponse()
        assert response.status == 200
        lines = response.read().decode().splitlines()
        check([json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines if line.startswith("data: ")])
        connection.close()
        whole += 1
    assert whole == STREAMS
    until(lambda: daemon.load("a") == 0, "every lease is back")


def check(events: list[Any]) -> None:
    """Every token is there once, in its place, and the end is the end."""
    tokens = [event for event in events[:-1] if event["choices"] and event["choices"][0]["delta"].get("content")]
    numbers = [event["timings"]["predicted_n"] for event in tokens]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= TOKENS
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == TOKENS


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_prompt_is_read_counts_until_the_slot_is_free(daemon: Daemon, stream: bool) -> None:
    """llama-server reads a prompt to its end for a client that has left, whatever the batch: see docs/troubleshooting.md."""
    prompt = [{"role": "user", "content": f"{stream} " + "tell me more about that " * 150}]
    connection = daemon.begin(CHAT, {**chat("a", 50, stream=stream), "messages": prompt})
    until(lambda: busy(daemon) == 1, "the prompt is being read")
    left = time.monotonic()
    connection.close()

    def free() -> bool:
        held = daemon.load("a")
        if busy(daemon):
            return False
        return held == 0 or daemon.load("a") == 0

    until(free, "the slot is free and the lease is back", 70)
    print(f"freed {time.monotonic() - left:.3f} s after its client left")
    assert daemon.chat("a", 1).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_whose_progress_is_told_is_not_read_to_its_end_for_nobody(daemon: Daemon, stream: bool) -> None:
    """A write to nobody is what llama-server notices, and it writes after each batch of 64 tokens."""

    def read() -> float:
        lines = daemon.request("GET", "/upstream/a/metrics").body.decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("llamacpp:prompt_tokens_total "))

    before = read()
    prompt = [{"role": "user", "content": f"progress {stream} " + "tell me more about that " * 150}]
    connection = daemon.begin(CHAT, {**chat("a", 50, stream=stream), "messages": prompt, "return_progress": True})
    until(lambda: busy(daemon) == 1, "the prompt is being read")
    connection.close()
    until(lambda: busy(daemon) == 0 and daemon.load("a") == 0, "the slot is free and the lease is back", 70)
    assert read() - before < 400  # of more than 700
    whole = daemon.chat("a", 1, return_progress=True)
    assert whole.status == 200
    assert "prompt_progress" not in whole.json()
    assert whole.json()["choices"][0]["message"]["content"]


def test_leaving_a_stream_frees_the_slot(daemon: Daemon) -> None:
    with daemon.stream("a", 2000, ignore_eos=True) as stream:
        stream.skip(3)
        left = time.monotonic()
    until(lambda: busy(daemon) == 0, "the slot is free", 10)
    print(f"freed {time.monotonic() - left:.3f} s after its client left")
    until(lambda: daemon.load("a") == 0, "the lease is back", 10)
