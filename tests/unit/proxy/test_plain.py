"""`/inference`: what a body means, and OpenAI's stream in the plain shape."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS
from offloadd.proxy.dialects.plain import PlainStream, answer, translate

ORIGIN = {"model": "a", "backend": "llamacpp", "instance": "a-1"}
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"role": "assistant", "content": None}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "Grüß"}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": " dich"}, "finish_reason": None}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"completion_tokens": 2}, "timings": {"predicted_n": 2}},
]
STREAM = b"".join(map(sse.event, CHUNKS)) + sse.DONE


def test_prompt_and_messages() -> None:
    assert translate({"prompt": "x", "backend": "llamacpp", "top_k": 3}) == (COMPLETIONS, {"prompt": "x", "top_k": 3})
    assert translate({"messages": [], "model": "a"}) == (CHAT, {"messages": [], "model": "a"})


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": []}, {"prompt": 1}, {"prompt": ["x"]}, {"messages": "x"}])
def test_bodies_that_mean_nothing(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        translate(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_body")


def test_answers() -> None:
    rest = {"usage": {"completion_tokens": 1}, "timings": {"predicted_n": 1}}
    expected = {**ORIGIN, "text": "x", "finish_reason": "stop", **rest}
    assert answer({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], **rest}, ORIGIN) == expected
    assert answer({"choices": [{"text": "x", "finish_reason": "stop"}], **rest}, ORIGIN) == expected
    assert answer({"choices": [{"message": {"content": None, "tool_calls": []}}]}, ORIGIN)["text"] == ""


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_however_it_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    stream = PlainStream(ORIGIN)
    out = b"".join(stream.feed(STREAM[start:end]) for start, end in itertools.pairwise(places)) + stream.end()
    assert out.endswith(sse.DONE)
    *pieces, last = [sse.decode(payload) for payload in sse.EventReader().feed(out)]
    assert pieces == [{"text": "Grüß"}, {"text": " dich"}]
    assert last == {**ORIGIN, "text": "", "finish_reason": "stop", "usage": {"completion_tokens": 2}, "timings": {"predicted_n": 2}}


def test_nothing_follows_an_error() -> None:
    stream = PlainStream(ORIGIN)
    error = {"error": {"message": "out of memory"}}
    told = {"error": {"message": "out of memory", "type": "server_error", "code": "backend_error", "param": None}}
    assert stream.feed(sse.event(CHUNKS[1]) + sse.event(error)) == sse.event({"text": "Grüß"}) + sse.event(told)
    assert stream.end() == b""


def test_a_stream_that_ends_too_soon_is_not_whole() -> None:
    stream = PlainStream(ORIGIN)
    stream.feed(sse.event(CHUNKS[1]))
    with pytest.raises(sse.CutStreamError):
        stream.end()
