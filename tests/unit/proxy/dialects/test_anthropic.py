"""Anthropic's requests as OpenAI's, and back: nothing is lost, and nothing comes out of order."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse, turns
from offloadd.proxy.dialects.anthropic import Message, chat_messages, to_chat
from offloadd.proxy.dialects.anthropic_answers import ChatTurn, MessageMerge, NativeTurn
from tests.unit.proxy.dialects.streams import (
    call,
    chunk,
    cut,
    events,
    gathered,
    needs_recordings,
    recorded,
    stream,
    through,
    usage,
)

Object = dict[str, Any]
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0"}}
WEATHER = {
    "name": "weather",
    "description": "Tells it",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def ask(**more: Any) -> Object:
    return {"model": "a", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **more}


def turn() -> ChatTurn:
    return ChatTurn("msg_1", "a")


def told(chunks: list[Object]) -> list[Object]:
    return events(through(turns.TurnStream(turn(), turns.as_named_events, "text/event-stream"), [stream(chunks)]))


def whole(chunks: list[Object]) -> Object:
    return gathered(turn(), MessageMerge(), chunks)


# --- requests ---


def test_a_plain_request() -> None:
    asked = ask(
        system="Be terse.", stop_sequences=["."], temperature=0, top_k=3, metadata={"user_id": "u"}, seed=7, service_tier="auto"
    )
    assert to_chat(asked) == {
        "model": "a",
        "max_tokens": 9,
        "messages": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hi"}],
        "stop": ["."],
        "temperature": 0,
        "top_k": 3,
        "user": "u",
        "seed": 7,
    }


def test_blocks_of_a_system_prompt() -> None:
    blocks = [{"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Two."}]
    assert to_chat(ask(system=blocks))["messages"][0] == {"role": "system", "content": "One.\nTwo."}


def test_pictures_and_documents() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}
    linked = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    content = [PNG, linked, document, {"type": "text", "text": "What is it?"}]
    (message,) = to_chat(ask(messages=[{"role": "user", "content": content}]))["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0"}},
        {"type": "image_url", "image_url": {"url": "http://x/y.png"}},
        {"type": "text", "text": "T\nbody"},
        {"type": "text", "text": "What is it?"},
    ]


def test_a_tool_from_call_to_result() -> None:
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look it up.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}, PNG]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    body = to_chat(ask(messages=messages, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}))
    function = {"name": "weather", "parameters": WEATHER["input_schema"], "description": "Tells it"}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look it up.",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0"}},
                {"type": "text", "text": "And?"},
            ],
        },
    ]


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_choice_of_a_tool(choice: Object, meant: object) -> None:
    assert to_chat(ask(tools=[WEATHER], tool_choice=choice))["tool_choice"] == meant


def test_thinking_and_format() -> None:
    schema = {"type": "object"}
    body = to_chat(
        ask(thinking={"type": "enabled", "budget_tokens": 99}, output_config={"format": {"type": "json_schema", "schema": schema}})
    )
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert to_chat(ask(thinking={"type": "disabled"}))["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"messages": "x"}, r"\$\.messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "runs at Anthropic"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
                        ],
                    }
                ]
            },
            "plain text",
        ),
    ],
)
def test_what_is_wrong_is_said(wrong: Object, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        to_chat(ask(**wrong))
    assert caught.value.status == 400


# --- answers ---


def test_a_stream_of_text() -> None:
    found = told(
        [
            chunk({"role": "assistant", "content": None}),
            chunk({"content": "Hel"}),
            chunk({"content": "lo"}),
            chunk({}, "stop"),
            usage(9, 2, 4),
        ]
    )
    assert [event["type"] for event in found] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"] == {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 2}


def test_a_thought_is_closed_before_the_text_begins() -> None:
    found = told([chunk({"reasoning_content": "Hm"}), chunk({"content": "Yes"}), chunk({}, "stop")])
    assert [(event["type"], event.get("index")) for event in found[2:-2]] == [
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
    ]
    assert found[4]["delta"] == {"type": "signature_delta", "signature": ""}


def test_calls_whose_pieces_are_mixed_up() -> None:
    pieces = [call(0, "a", '{"x"', "c0"), call(1, "b", '{"y":', "c1"), call(0, "", ":1}"), call(1, "", "2}")]
    found = whole([*map(chunk, pieces), chunk({}, "tool_calls")])
    assert found["content"] == [
        {"type": "tool_use", "id": "c0", "name": "a", "input": {"x": 1}},
        {"type": "tool_use", "id": "c1", "name": "b", "input": {"y": 2}},
    ]
    assert found["stop_reason"] == "tool_use"


def test_a_call_that_was_cut_off_keeps_what_there_is() -> None:
    found = whole([chunk(call(0, "a", '{"x": "lon', "c0")), chunk({}, "length")])
    assert found["content"][0]["input"] == {"partial_json": '{"x": "lon'}
    assert found["stop_reason"] == "max_tokens"


def test_the_stop_sequence_that_an_engine_names() -> None:
    last = chunk({}, "stop")
    last["choices"][0]["stop_reason"] = "."
    found = whole([chunk({"content": "x"}), last])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", ".")


def test_an_error_event_ends_the_stream() -> None:
    change = turns.TurnStream(turn(), turns.as_named_events, "text/event-stream")
    out = change.feed(
        sse.event(chunk({"content": "x"}))
        + sse.event({"error": {"message": "boom", "code": 500}})
        + sse.event(chunk({"content": "y"}))
    )
    assert events(out + change.end())[-1] == {"type": "error", "error": {"type": "api_error", "message": "boom"}}


def test_a_stream_that_ends_too_soon() -> None:
    change = turns.TurnStream(turn(), turns.as_named_events, "text/event-stream")
    change.feed(sse.event(chunk({"content": "x"})))
    with pytest.raises(sse.CutStreamError):
        change.end()
    assert events(change.fail(RequestError(502, "backend_lost", "it died")))[-1]["error"]["message"] == "it died"


# --- there and back ---

TEXTS = st.text(min_size=1, max_size=12)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, given: {"type": "tool_use", "name": name, "input": given},
    st.text("abc_", min_size=1, max_size=6),
    st.dictionaries(st.text(max_size=4), JSONS, max_size=3),
)


@st.composite
def answers(draw: st.DrawFn) -> list[Object]:
    """The blocks of an assistant's message in the order in which models make them: a thought, text, calls."""
    thoughts = [{"type": "thinking", "thinking": text, "signature": ""} for text in draw(st.lists(TEXTS, max_size=1))]
    texts = [{"type": "text", "text": text} for text in draw(st.lists(TEXTS, max_size=1))]
    calls = [{**block, "id": f"t{number}"} for number, block in enumerate(draw(st.lists(CALLS, max_size=3)))]
    return [*thoughts, *texts, *calls]


def as_chunks(message: Object, cuts: list[int]) -> list[Object]:
    """A message of OpenAI's as an engine would stream it, its texts cut somewhere."""
    out = [chunk({"role": "assistant", "content": None})]
    for name in ("reasoning_content", "content"):
        text = message.get(name) or ""
        at = cuts[0] % (len(text) + 1) if cuts else 0
        out += [chunk({name: piece}) for piece in (text[:at], text[at:]) if piece]
    for index, made in enumerate(message.get("tool_calls") or ()):
        function = made["function"]
        out.append(chunk(call(index, function["name"], "", made["id"])))
        at = (cuts[-1] if cuts else 3) % (len(function["arguments"]) + 1)
        out += [chunk(call(index, "", piece)) for piece in (function["arguments"][:at], function["arguments"][at:]) if piece]
    return [*out, chunk({}, "tool_calls" if message.get("tool_calls") else "stop"), usage(5, 3)]


@given(blocks=answers(), cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_there_and_back_keeps_text_calls_and_order(blocks: list[Object], cuts: list[int]) -> None:
    (said,) = chat_messages(msgspec.convert({"role": "assistant", "content": blocks}, Message))
    chunks = as_chunks(said, cuts)
    assert whole(chunks)["content"] == blocks
    data = stream(chunks)
    change = turns.TurnStream(turn(), turns.as_named_events, "text/event-stream")
    found = events(through(change, cut(data, cuts)))
    assert found == told(chunks)
    check_order(found)
    merge = MessageMerge()
    for event in found:
        merge.add(event)
    assert merge.answer()["content"] == blocks


def check_order(found: list[Object]) -> None:
    """One block open at a time, numbered from 0, each closed, all between the message's begin and end."""
    assert found[0]["type"] == "message_start"
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    opened: int | None = None
    count = 0
    for event in found[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert opened is None
                assert event["index"] == count
                opened, count = event["index"], count + 1
            case "content_block_delta":
                assert event["index"] == opened
            case "content_block_stop":
                assert event["index"] == opened
                opened = None
            case kind:
                assert kind == "ping"
    assert opened is None


# --- engines that speak it ---


@needs_recordings
@pytest.mark.parametrize(
    ("name", "kinds", "stop"),
    [
        ("llamacpp/messages-stream.sse", ["text"], "max_tokens"),
        ("llamacpp/messages-tool-use-stream.sse", ["tool_use"], "tool_use"),
        ("llamacpp/reasoning-messages-stream.sse", ["thinking", "text"], "end_turn"),
        ("vllm/messages-stream.sse", ["text"], "max_tokens"),
        ("vllm/messages-tool-use-stream.sse", ["tool_use", "tool_use"], "max_tokens"),
    ],
)
def test_native_streams_are_put_right(name: str, kinds: list[str], stop: str) -> None:
    _, _, body = recorded(name)
    change = turns.TurnStream(NativeTurn("msg_1", "a"), turns.as_named_events, "text/event-stream")
    found = events(through(change, cut(body, range(0, len(body), 97))))
    check_order(found)
    message = gathered(NativeTurn("msg_1", "a"), MessageMerge(), events(body))
    assert (message["id"], message["model"], message["stop_reason"]) == ("msg_1", "a", stop)
    assert [block["type"] for block in message["content"]] == kinds
    assert message["usage"]["output_tokens"] > 0
    for block in message["content"]:
        assert block["type"] != "tool_use" or "input" in block
        assert block["type"] != "thinking" or block["signature"] == ""


def test_a_native_stop_sequence_has_its_reason() -> None:
    (found,) = NativeTurn("msg_1", "a").add({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": "."}})
    assert found["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "."}


@needs_recordings
@pytest.mark.parametrize(
    "name",
    [
        "llamacpp/chat-completion-tools-required-stream.sse",
        "llamacpp/chat-completion-stream-usage.sse",
        "llamacpp/reasoning-chat-stream.sse",
        "vllm/toolcall-required-stream.sse",
        "vllm/chat-completion-stream-usage.sse",
    ],
)
def test_recorded_chats_become_messages(name: str) -> None:
    _, _, body = recorded(name)
    change = turns.TurnStream(turn(), turns.as_named_events, "text/event-stream")
    found = events(through(change, cut(body, range(0, len(body), 131))))
    check_order(found)
    assert found[-2]["usage"]["output_tokens"] > 0 or "usage" not in name
