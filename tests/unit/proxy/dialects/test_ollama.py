"""Ollama's requests as OpenAI's, and OpenAI's chunks as Ollama's lines."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import ollama, turns
from offloadd.proxy.dialects.ollama_answers import LineMerge, OllamaTurn, Times, embedded, loaded
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS
from tests.unit.proxy.dialects.streams import call, chunk, cut, gathered, needs_recordings, recorded, stream, through, usage

Object = dict[str, Any]
HI = [{"role": "user", "content": "hi"}]
TIMES = Times(created=lambda: "2026-01-02T03:04:05Z", spent=lambda: 2.0, loading=0.5)


def turn(*, chat: bool = True) -> OllamaTurn:
    return OllamaTurn("a", TIMES, chat)


def lines(data: bytes) -> list[Object]:
    return [json.loads(line) for line in data.splitlines()]


def change(*, chat: bool = True) -> turns.TurnStream:
    return turns.TurnStream(turn(chat=chat), turns.as_lines, "application/x-ndjson")


# --- requests ---


def test_options_by_their_names() -> None:
    options = {"temperature": 0, "num_predict": 9, "stop": ["x"], "repeat_penalty": 1.1, "mirostat": 1, "num_ctx": 99, "num_gpu": 1}
    asked, body = ollama.chat({"model": "a", "messages": HI, "options": options})
    penalties = {"repeat_penalty": 1.1, "repetition_penalty": 1.1}
    assert body == {"messages": HI, "temperature": 0, "max_tokens": 9, "stop": ["x"], "mirostat": 1, **penalties}
    assert ollama.not_heeded(asked.options) == ("num_ctx", "num_gpu")
    assert asked.streams
    assert "max_tokens" not in ollama.chat({"model": "a", "messages": HI, "options": {"num_predict": -1}})[1]


def test_format_and_think() -> None:
    schema = {"type": "object"}
    assert ollama.chat({"model": "a", "messages": HI, "format": "json"})[1]["response_format"] == {"type": "json_object"}
    named = ollama.chat({"model": "a", "messages": HI, "format": schema})[1]["response_format"]
    assert named["json_schema"]["schema"] == schema
    assert ollama.chat({"model": "a", "messages": HI, "think": False})[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert ollama.chat({"model": "a", "messages": HI, "think": "high"})[1]["reasoning_effort"] == "high"
    assert "chat_template_kwargs" not in ollama.chat({"model": "a", "messages": HI})[1]


def test_calls_get_ids_and_results_find_them() -> None:
    messages = [
        {
            "role": "assistant",
            "thinking": "Hm",
            "tool_calls": [{"function": {"name": "a", "arguments": {"x": 1}}}, {"function": {"name": "b"}}],
        },
        {"role": "tool", "tool_name": "b", "content": "B"},
        {"role": "tool", "content": "A"},
    ]
    said, second, first = ollama.chat({"model": "a", "messages": messages})[1]["messages"]
    ids = [made["id"] for made in said["tool_calls"]]
    assert len(set(ids)) == 2
    assert said["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"x":1}'}
    assert (said["content"], said["reasoning_content"]) == (None, "Hm")
    assert (second["tool_call_id"], first["tool_call_id"]) == (ids[1], ids[0])


def test_pictures() -> None:
    (message,) = ollama.chat({"model": "a", "messages": [{"role": "user", "content": "What?", "images": ["/9j/4A", "iVBOR"]}]})[1][
        "messages"
    ]
    assert [part.get("image_url", {}).get("url") for part in message["content"]] == [
        None,
        "data:image/jpeg;base64,/9j/4A",
        "data:image/png;base64,iVBOR",
    ]


def test_generate_is_a_chat_unless_raw() -> None:
    assert ollama.generate({"model": "a", "prompt": "x", "system": "s"})[1:] == (
        CHAT,
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]},
    )
    assert ollama.generate({"model": "a", "prompt": "x", "raw": True})[1:] == (COMPLETIONS, {"prompt": "x"})
    assert ollama.generate({"model": "a", "prompt": "x", "suffix": "y"})[1:] == (COMPLETIONS, {"prompt": "x", "suffix": "y"})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model": "a", "messages": "x"},
        {"model": "a", "messages": [{"role": "robot"}]},
        {"model": "a", "messages": HI, "format": "xml"},
        {"model": "a", "messages": HI, "stream": "no"},
    ],
)
def test_what_is_wrong_is_refused(wrong: Object) -> None:
    with pytest.raises(RequestError) as caught:
        ollama.chat(wrong)
    assert caught.value.status == 400


def test_embedding_requests() -> None:
    assert ollama.embed({"model": "a", "input": ["x", "y"]})[1] == {"input": ["x", "y"], "encoding_format": "float"}
    assert ollama.embed({"model": "a", "prompt": "x"})[1]["input"] == "x"
    with pytest.raises(RequestError, match="input"):
        ollama.embed({"model": "a"})


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        ("", None),
        (0, 0),
        ("0", 0),
        ("5m", 300),
        ("1h30m", 5400),
        ("100ms", 0.1),
        (90, 90),
        ("1.5h", 5400),
        (-1, math.inf),
        ("-1m", math.inf),
    ],
)
def test_keep_alive(given: Any, seconds: float | None) -> None:
    assert ollama.keep_alive(given) == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("given", ["soon", "5 m", "5x", "m5"])
def test_keep_alive_that_means_nothing(given: str) -> None:
    with pytest.raises(RequestError, match="keep_alive"):
        ollama.keep_alive(given)


# --- answers ---


def test_a_chat() -> None:
    timings = {"prompt_ms": 100.0, "predicted_ms": 400.0}
    chunks = [
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "Hm"}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
    ]
    ends = [chunk({}, "length"), {**usage(9, 2), "timings": timings}]
    *pieces, last = lines(through(change(), [stream([*chunks, *ends])]))
    head = {"model": "a", "created_at": "2026-01-02T03:04:05Z"}
    assert pieces == [
        {**head, "message": {"role": "assistant", "content": "", "thinking": "Hm"}, "done": False},
        {**head, "message": {"role": "assistant", "content": "Hel"}, "done": False},
        {**head, "message": {"role": "assistant", "content": "lo"}, "done": False},
    ]
    counts = {
        "total_duration": 2_000_000_000,
        "load_duration": 500_000_000,
        "prompt_eval_count": 9,
        "prompt_eval_duration": 100_000_000,
        "eval_count": 2,
        "eval_duration": 400_000_000,
    }
    assert last == {**head, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "length", **counts}
    whole = gathered(turn(), LineMerge(), [*chunks, *ends])
    assert whole == {**last, "message": {"role": "assistant", "content": "Hello", "thinking": "Hm"}}


def test_a_call_is_told_when_it_is_whole() -> None:
    chunks = [
        chunk(call(0, "weather", "", "c0")),
        chunk(call(0, "", '{"city":')),
        chunk(call(0, "", '"Rome"}')),
        chunk({}, "tool_calls"),
    ]
    told, last = lines(through(change(), [stream(chunks)]))
    assert told["message"]["tool_calls"] == [{"id": "c0", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    assert last["done"]
    assert gathered(turn(), LineMerge(), chunks)["message"]["tool_calls"] == told["message"]["tool_calls"]


def test_generating() -> None:
    chunks = [{"choices": [{"text": "Par", "index": 0}]}, {"choices": [{"text": "is", "index": 0, "finish_reason": "stop"}]}]
    found = lines(through(change(chat=False), [stream(chunks)]))
    assert [line["response"] for line in found] == ["Par", "is", ""]
    assert gathered(turn(chat=False), LineMerge(), chunks)["response"] == "Paris"


def test_an_error_is_a_line() -> None:
    out = change().feed(b'data: {"error": {"message": "boom", "code": 500}}\n\n')
    assert lines(out) == [{"error": "boom"}]


@needs_recordings
@given(cuts=st.lists(st.integers(0, 100_000), max_size=20))
def test_any_split_gives_the_same_lines(cuts: list[int]) -> None:
    _, _, body = recorded("llamacpp/chat-completion-utf8.sse")
    whole = lines(through(change(), [body]))
    assert lines(through(change(), cut(body, cuts))) == whole
    assert len(whole) > 3


def test_loading_and_embedding() -> None:
    assert loaded("a", TIMES, chat=True)["done_reason"] == "load"
    assert loaded("a", TIMES, chat=False, unloaded=True)["done_reason"] == "unload"
    answer = {"data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}], "usage": {"prompt_tokens": 5}}
    found = embedded(answer, "a", TIMES)
    assert (found["embeddings"], found["prompt_eval_count"]) == ([[1.0], [2.0]], 5)
