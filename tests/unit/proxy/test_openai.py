"""A plain answer put together from the chunks of a stream, in the shapes that llama-server sends."""

from __future__ import annotations

from typing import Any

import pytest

from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS, Collector, as_stream, can_collect

HEAD = {"id": "chatcmpl-7", "created": 1754321000, "model": "tiny", "system_fingerprint": "b1-7e4c0a9"}
USAGE = {"completion_tokens": 2, "prompt_tokens": 9, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 0}}
TIMINGS = {"prompt_n": 9, "predicted_n": 2}


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    """A chat chunk as llama-server sends it; `logprobs` belongs to the choice."""
    choice = {"finish_reason": finish, "index": 0, "delta": delta}
    choice |= {"logprobs": more.pop("logprobs")} if "logprobs" in more else {}
    return {"choices": [choice], **HEAD, "object": "chat.completion.chunk", **more}


def last() -> dict[str, Any]:
    return {"choices": [], **HEAD, "object": "chat.completion.chunk", "usage": USAGE, "timings": TIMINGS}


def collect(chunks: list[dict[str, Any]], path: str = CHAT) -> dict[str, Any]:
    collector = Collector(path)
    for each in chunks:
        assert collector.error is None
        collector.add(each)
    assert collector.complete
    return collector.answer()


def message(*deltas: dict[str, Any]) -> dict[str, Any]:
    """The message that these deltas make."""
    chunks = [chunk({"role": "assistant", "content": None}), *map(chunk, deltas), chunk({}, "stop"), last()]
    return dict(collect(chunks)["choices"][0]["message"])


def test_chat() -> None:
    chunks = [chunk({"role": "assistant", "content": None}), chunk({"content": "Hel"}), chunk({"content": "lo"})]
    assert collect([*chunks, chunk({}, "length"), last()]) == {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"finish_reason": "length", "index": 0, "message": {"role": "assistant", "content": "Hello"}}],
        "usage": USAGE,
        "timings": TIMINGS,
    }


def test_an_empty_answer_has_empty_text() -> None:
    assert message() == {"role": "assistant", "content": ""}


def test_reasoning_is_gathered_beside_the_text() -> None:
    found = message({"reasoning_content": "Let me "}, {"reasoning_content": "think."}, {"content": "Yes"})
    assert found == {"role": "assistant", "reasoning_content": "Let me think.", "content": "Yes"}


def test_a_tool_call_in_pieces() -> None:
    found = message(
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '":"Rome"}'}}]},
    )
    assert found["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    ]
    assert found["content"] is None


def test_several_tool_calls_with_text_before_them() -> None:
    found = message(
        {"content": "I look."},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "b", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "a", "arguments": "{}"}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]},
    )
    assert [(call["id"], call["function"]) for call in found["tool_calls"]] == [
        ("c1", {"name": "a", "arguments": "{}"}),
        ("c2", {"name": "b", "arguments": "{}"}),
    ]
    assert found["content"] == "I look."


def test_logprobs_are_joined() -> None:
    one, two = ({"token": token, "logprob": -0.1, "top_logprobs": []} for token in ("a", "b"))
    found = collect(
        [
            chunk({"content": "a"}, logprobs={"content": [one]}),
            chunk({"content": "b"}, logprobs={"content": [two]}),
            chunk({}, "stop"),
        ]
    )
    assert found["choices"][0]["logprobs"] == {"content": [one, two]}


def test_text_completions() -> None:
    def text(piece: str, finish: str | None = None) -> dict[str, Any]:
        return {
            "choices": [{"text": piece, "index": 0, "logprobs": None, "finish_reason": finish}],
            **HEAD,
            "object": "text_completion",
        }

    usage = {"choices": [], **HEAD, "object": "text_completion", "usage": USAGE, "timings": TIMINGS}
    assert collect([text("The"), text(" sky"), text("", "stop"), usage], COMPLETIONS) == {
        **HEAD,
        "object": "text_completion",
        "choices": [{"text": "The sky", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "timings": TIMINGS,
    }


def test_an_error_event_is_kept() -> None:
    collector = Collector(CHAT)
    collector.add(chunk({"content": "Hel"}))
    error = {"error": {"code": 500, "message": "out of memory", "type": "server_error"}}
    collector.add(error)
    assert collector.error == error
    assert not collector.complete


def test_a_stream_that_was_cut_is_not_complete() -> None:
    collector = Collector(CHAT)
    collector.add(chunk({"role": "assistant", "content": None}))
    collector.add(chunk({"content": "Hel"}))
    assert not collector.complete


@pytest.mark.parametrize(
    ("path", "body", "possible"),
    [
        (CHAT, {"messages": []}, True),
        (CHAT, {"n": 1}, True),
        (CHAT, {"n": None}, True),
        (CHAT, {"n": 2}, True),
        (CHAT, {"n": 0}, False),
        (CHAT, {"n": "2"}, False),
        (CHAT, {"timings_per_token": True}, False),
        (CHAT, {"return_progress": True}, True),
        (COMPLETIONS, {"prompt": "x"}, True),
        (COMPLETIONS, {"prompt": ["x", "y"]}, False),
        (COMPLETIONS, {"prompt": [1, 2]}, False),
        (COMPLETIONS, {"prompt": "x", "echo": True}, False),
        ("/v1/embeddings", {"input": "x"}, False),
    ],
)
def test_what_can_be_put_together(path: str, body: dict[str, Any], possible: bool) -> None:
    assert can_collect(path, body) is possible


def test_progress_of_the_prompt_is_no_part_of_the_answer() -> None:
    collector = Collector(CHAT)
    empty = {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
    collector.add({**empty, "prompt_progress": {"total": 9, "processed": 5}})
    collector.add({"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]})
    choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}, "logprobs": None}]
    found = collector.answer()
    assert "prompt_progress" not in found
    assert [{**choice, "logprobs": choice.get("logprobs")} for choice in found["choices"]] == choices


def test_the_request_as_a_stream() -> None:
    asked = as_stream({"model": "a", "stream": False, "stream_options": {"include_usage": False}})
    assert asked == {"model": "a", "stream": True, "stream_options": {"include_usage": True}}
