"""OpenAI's responses as chat completions, and back: nothing is lost, and every event is in its place."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse, turns
from offloadd.proxy.dialects.responses import ResponseMerge, ResponsesTurn
from offloadd.proxy.dialects.responses_answers import ChatResponseTurn
from offloadd.proxy.dialects.responses_requests import check_stateless, to_chat
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
WEATHER = {"type": "function", "name": "weather", "description": "Tells it", "parameters": {"type": "object"}, "strict": True}
EVENTS = "text/event-stream"
PIXEL = "data:image/png;base64,iVBORw0"


def ask(**more: Any) -> Object:
    return {"model": "a", "input": "hi", **more}


def turn(**asked: Any) -> ChatResponseTurn:
    return ChatResponseTurn("7", "a", 1_700_000_000, ask(**asked))


def change(**asked: Any) -> turns.TurnStream:
    return turns.TurnStream(turn(**asked), turns.as_named_events, "text/event-stream")


def told(chunks: list[Object]) -> list[Object]:
    return events(through(change(), [stream(chunks)]))


def whole(chunks: list[Object], **asked: Any) -> Object:
    return gathered(turn(**asked), ResponseMerge(), chunks)


# --- requests ---


def test_a_plain_request() -> None:
    asked = ask(
        instructions="Be terse.",
        max_output_tokens=9,
        temperature=0,
        top_p=0.5,
        reasoning={"effort": "low", "summary": None},
        seed=7,
        user="u",
        store=False,
        metadata={"x": "y"},
        truncation="auto",
        stream=True,
        backend="llamacpp",
        previous_response_id=None,
        include=["reasoning.encrypted_content"],
    )
    assert to_chat(asked) == {
        "model": "a",
        "max_tokens": 9,
        "messages": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hi"}],
        "temperature": 0,
        "top_p": 0.5,
        "reasoning_effort": "low",
        "seed": 7,
        "user": "u",
    }


def test_system_prompts_at_the_beginning_are_one() -> None:
    given = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Two."}]},
        {"role": "user", "content": "hi"},
        {"type": "message", "role": "system", "content": "Later."},
    ]
    assert to_chat(ask(instructions="One.", input=given))["messages"] == [
        {"role": "system", "content": "One.\nTwo."},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "Later."},
    ]


def test_pictures_and_sound() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}}
    content = [{"type": "input_image", "image_url": PIXEL, "detail": "low"}, sound, {"type": "input_text", "text": "What is it?"}]
    (message,) = to_chat(ask(input=[{"role": "user", "content": content}]))["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        sound,
        {"type": "text", "text": "What is it?"},
    ]


def test_tools_from_call_to_output() -> None:
    given = [
        {"role": "user", "content": "Weather in Rome and Oslo?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look it up."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'},
        {"type": "function_call", "id": "fc_2", "call_id": "c2", "name": "weather", "arguments": '{"city":"Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PIXEL}],
        },
    ]
    body = to_chat(ask(input=given, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False))
    function = {"name": "weather", "parameters": {"type": "object"}, "description": "Tells it", "strict": True}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    calls = [("c1", '{"city":"Rome"}'), ("c2", '{"city":"Oslo"}')]
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Look it up.",
            "tool_calls": [
                {"id": key, "type": "function", "function": {"name": "weather", "arguments": given}} for key, given in calls
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "see"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]},
    ]


def test_two_answers_in_a_row_stay_two() -> None:
    given = [{"role": "assistant", "content": text} for text in ("one", "two")]
    assert [message["content"] for message in to_chat(ask(input=given))["messages"]] == ["one", "two"]


@pytest.mark.parametrize(
    ("choice", "meant", "names"),
    [
        ("auto", "auto", ["weather", "time"]),
        ({"type": "function", "name": "time"}, {"type": "function", "function": {"name": "time"}}, ["weather", "time"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}, "required", ["time"]),
    ],
)
def test_choice_of_a_tool(choice: Any, meant: object, names: list[str]) -> None:
    body = to_chat(ask(tools=[WEATHER, {"type": "function", "name": "time"}], tool_choice=choice))
    assert body["tool_choice"] == meant
    assert [tool["function"]["name"] for tool in body["tools"]] == names


def test_format_and_probabilities() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    body = to_chat(ask(text={"format": wanted, "verbosity": "low"}, include=["message.output_text.logprobs"], top_logprobs=2))
    assert body["response_format"] == {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
    assert to_chat(ask(text={"format": {"type": "json_object"}}))["response_format"] == {"type": "json_object"}
    assert "response_format" not in to_chat(ask(text={"format": {"type": "text"}}))


@pytest.mark.parametrize(
    ("wrong", "says", "param"),
    [
        ({"previous_response_id": "resp_1"}, "no responses are stored here", "previous_response_id"),
        ({"conversation": "conv_1"}, "no responses are stored here", "conversation"),
        ({"prompt": {"id": "p"}}, "no responses are stored here", "prompt"),
        ({"store": True}, "no responses are stored here", "store"),
        ({"background": True}, "no responses are stored here", "background"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "msg_1.*not stored here", "input"),
        ({"input": []}, '"input" must be', "input"),
        ({"input": None}, '"input" must be', "input"),
        ({"input": 7}, r"\$\.input", None),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "web_search_call", None),
        ({"input": [{"role": "robot", "content": "x"}]}, "robot", None),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf"}]}]}, "a.pdf", "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "image_url", "input"),
        ({"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PIXEL}]}]}, "only text", "input"),
        ({"max_output_tokens": "9"}, "max_output_tokens", None),
        ({"tools": [{"type": "web_search"}]}, "web_search.*not offered", "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "none of", "tool_choice"),
    ],
)
def test_what_is_wrong_is_said(wrong: Object, says: str, param: str | None) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        to_chat(ask(**wrong))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_asks_for_nothing_to_be_kept_is_fine() -> None:
    check_stateless(ask(store=False, background=False, previous_response_id=None, conversation=None))


# --- answers ---


def test_a_stream_of_text() -> None:
    found = told([chunk({"role": "assistant", "content": ""}), *(chunk({"content": x}) for x in ("Hel", "lo")), chunk({}, "stop")])
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "completed"),
    ]
    check_order(found)
    assert found[6]["text"] == "Hello"
    response = found[-1]["response"]
    (item,) = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (response["id"], response["model"], response["created_at"]) == ("resp_7", "a", 1_700_000_000)
    assert (response["status"], response["error"], response["incomplete_details"]) == ("completed", None, None)


def test_what_was_asked_is_told_back_with_the_counts() -> None:
    response = whole(
        [chunk({"content": "x"}), chunk({}, "stop"), usage(9, 2, 4)], temperature=0, instructions="Be terse.", tools=[WEATHER]
    )
    assert (response["temperature"], response["instructions"], response["tools"]) == (0, "Be terse.", [WEATHER])
    assert (response["store"], response["tool_choice"], response["parallel_tool_calls"]) == (False, "auto", True)
    assert response["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 11,
    }


@pytest.mark.parametrize(("reason", "said"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_what_was_cut_off_says_so(reason: str, said: str) -> None:
    chunks = [chunk({"content": "x"}), chunk(call(0, "a", '{"x": "lon', "c0")), chunk({}, reason)]
    found = told(chunks)
    check_order(found)
    assert found[-1]["type"] == "response.incomplete"
    response = whole(chunks)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": said})
    message, made = response["output"]
    assert (message["status"], made["status"], made["arguments"]) == ("completed", "incomplete", '{"x": "lon')


def test_calls_whose_pieces_are_mixed_up_and_one_whose_name_comes_late() -> None:
    pieces = [call(0, "a", '{"x"', "c0"), call(1, "", '{"y"', "c1"), call(0, "", ":1}"), call(1, "b", ":2}"), call(2, "", "{}")]
    found = told([*map(chunk, pieces), chunk({}, "tool_calls")])
    check_order(found)
    made = [(item["call_id"], item["name"], item["arguments"]) for item in found[-1]["response"]["output"]]
    assert made == [("c0", "a", '{"x":1}'), ("c1", "b", '{"y":2}'), ("call_7_2", "", "{}")]


def test_a_refusal_is_a_part_of_its_own() -> None:
    found = told([chunk({"content": "Well,"}), chunk({"refusal": "no"}), chunk({}, "stop")])
    check_order(found)
    (item,) = found[-1]["response"]["output"]
    assert [part["type"] for part in item["content"]] == ["output_text", "refusal"]
    assert item["content"][1] == {"type": "refusal", "refusal": "no"}


def test_probabilities_stay_with_their_text() -> None:
    said = chunk({"content": "x"})
    probability = {"token": "x", "logprob": -0.1, "bytes": [120], "top_logprobs": []}
    said["choices"][0]["logprobs"] = {"content": [probability]}
    found = told([said, said, chunk({}, "stop")])
    assert [event["logprobs"] for event in found if event["type"] == "response.output_text.delta"] == [[probability]] * 2
    assert found[-1]["response"]["output"][0]["content"][0]["logprobs"] == [probability] * 2


def test_an_error_event_ends_the_stream() -> None:
    through_it = change()
    out = through_it.feed(
        sse.event(chunk({"content": "x"}))
        + sse.event({"error": {"message": "boom", "code": 500}})
        + sse.event(chunk({"content": "y"}))
    )
    found = events(out + through_it.end())
    assert (found[-1]["type"], found[-1]["message"], found[-1]["sequence_number"]) == ("error", "boom", len(found) - 1)


def test_a_stream_that_ends_too_soon() -> None:
    through_it = change()
    through_it.feed(sse.event(chunk({"content": "x"})))
    with pytest.raises(sse.CutStreamError):
        through_it.end()
    assert events(through_it.fail(RequestError(502, "backend_lost", "it died")))[-1]["message"] == "it died"


@contextlib.contextmanager
def sdk(chunks: list[Object]) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, before an engine that answers with these chunks."""

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        to_chat(asked)
        if not asked.get("stream"):
            return httpx.Response(200, json=whole(chunks, **asked))
        return httpx.Response(200, content=through(change(**asked), [stream(chunks)]), headers={"Content-Type": EVENTS})

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        openai.OpenAI(base_url="http://x/v1", api_key="unused", max_retries=0, http_client=http) as client,
    ):
        yield client


def test_openais_client_finds_calls_thoughts_and_text() -> None:
    pieces = [{"reasoning_content": "Hm"}, {"content": "I"}, {"content": " look."}]
    calls = [call(0, "weather", '{"city":', "c0"), call(1, "weather", '{"city":"Oslo"}', "c1"), call(0, "", '"Rome"}')]
    chunks = [*map(chunk, [*pieces, *calls]), chunk({}, "tool_calls"), usage(9, 7)]
    tools: Any = [{**WEATHER, "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}]
    asked: Any = {"model": "a", "input": "Weather?", "tools": tools}
    with sdk(chunks) as client:
        plain = client.responses.create(**asked)
        assert plain.output_text == "I look."
        thinking, said, *made = plain.output
        assert (thinking.type, said.type) == ("reasoning", "message")
        assert thinking.content
        assert thinking.content[0].text == "Hm"
        assert [(one.call_id, one.arguments) for one in made if one.type == "function_call"] == [
            ("c0", '{"city":"Rome"}'),
            ("c1", '{"city":"Oslo"}'),
        ]
        assert [event.type for event in client.responses.create(**asked, stream=True)][-1] == "response.completed"
        with client.responses.stream(**asked) as events_of_it:
            final = events_of_it.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
        assert final.usage
        assert final.usage.total_tokens == 16
        # Its own answer and what the tools gave make the next request.
        given = [{"type": "function_call_output", "call_id": key, "output": "sunny"} for key in ("c0", "c1")]
        talk: Any = [{"role": "user", "content": "Weather?"}, *plain.output, *given]
        assert client.responses.create(**{**asked, "input": talk}).output


# --- there and back ---

TEXTS = st.text(min_size=1, max_size=12)
CALLS = st.builds(
    lambda name, given: {"type": "function_call", "name": name, "arguments": msgspec.json.encode(given).decode()},
    st.text("abc_", min_size=1, max_size=6),
    st.dictionaries(st.text(max_size=4), st.integers(-9, 9) | st.text(max_size=6), max_size=3),
)


@st.composite
def outputs(draw: st.DrawFn) -> list[Object]:
    """The items of a model's answer in the order in which models make them: a thought, a text, calls."""
    thoughts = [[{"type": "reasoning_text", "text": text}] for text in draw(st.lists(TEXTS, max_size=1))]
    empty: Object = {"type": "output_text", "annotations": [], "logprobs": []}
    texts = [[{**empty, "text": text}] for text in draw(st.lists(TEXTS, max_size=1))]
    said: list[Object] = [{"type": "reasoning", "summary": [], "content": content} for content in thoughts]
    said += [{"type": "message", "role": "assistant", "content": content} for content in texts]
    calls = [{**made, "call_id": f"c{number}"} for number, made in enumerate(draw(st.lists(CALLS, max_size=3)))]
    if not calls and not texts:
        return []  # a thought alone is no answer
    return [{**item, "status": "completed"} for item in [*said, *calls]]


def as_chunks(message: Object, cuts: list[int]) -> list[Object]:
    """A message of OpenAI's as an engine would stream it: its texts in two pieces, the pieces of its calls in turn."""
    at = itertools.cycle(cuts or [3])
    out = [chunk({"role": "assistant", "content": None})]

    def halves(text: str) -> list[str]:
        place = next(at) % (len(text) + 1)
        return [piece for piece in (text[:place], text[place:]) if piece]

    for name in ("reasoning_content", "content"):
        out += [chunk({name: piece}) for piece in halves(message.get(name) or "")]
    pieces = []
    for index, made in enumerate(message.get("tool_calls") or ()):
        out.append(chunk(call(index, made["function"]["name"], "", made["id"])))
        pieces += [(part, index, piece) for part, piece in enumerate(halves(made["function"]["arguments"]))]
    out += [chunk(call(index, "", piece)) for _, index, piece in sorted(pieces)]
    return [*out, chunk({}, "tool_calls" if message.get("tool_calls") else "stop"), usage(5, 3)]


def without_ids(items: list[Object]) -> list[Object]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


@given(items=outputs(), cuts=st.lists(st.integers(0, 10_000), max_size=12))
def test_there_and_back_keeps_every_item(items: list[Object], cuts: list[int]) -> None:
    asked = to_chat(ask(input=[{"role": "user", "content": "x"}, *items]))["messages"]
    said = asked[1] if items else {}
    chunks = as_chunks(said, cuts)
    response = whole(chunks)
    assert without_ids(response["output"]) == items
    data = stream(chunks)
    found = events(through(change(), cut(data, cuts)))
    assert found == told(chunks)
    check_order(found)
    assert found[-1]["response"] == response
    # The answer is a fit beginning of the next request.
    again = to_chat(ask(input=[{"role": "user", "content": "x"}, *response["output"]]))["messages"]
    assert again == asked


def check_order(found: list[Object]) -> None:
    """Numbered without a gap; items and parts are added, written and done; the deltas are the text; the last event has it all."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    items: dict[int, Object] = {}
    done: dict[int, Object] = {}
    texts: dict[tuple[int, int], str] = {}
    for event in found[2:-1]:
        kind, index = event["type"].removeprefix("response."), event["output_index"]
        place = (index, event.get("content_index", -1))
        if kind == "output_item.added":
            assert index == len(items)
            items[index] = event["item"]
            continue
        assert index in items
        assert index not in done
        assert event.get("item_id", items[index]["id"]) == items[index]["id"]
        if kind == "content_part.added":
            assert place not in texts
            texts[place] = ""
        elif kind.endswith(".delta"):
            texts[place] = texts.get(place, "" if place[1] < 0 else None) + event["delta"]  # type: ignore[operator]
        elif kind == "content_part.done":
            assert texts[place] in event["part"].values()
        elif kind == "output_item.done":
            done[index] = event["item"]
        else:
            assert kind.endswith(".done")
            assert texts.get(place, "") in event.values()
    assert list(found[-1]["response"]["output"]) == [done[index] for index in sorted(items)]


# --- recorded engines ---


@needs_recordings
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llamacpp/chat-completion-tools-required-stream.sse", None),
        ("llamacpp/chat-completion-stream-usage.sse", ["message"]),
        ("llamacpp/reasoning-chat-stream.sse", ["reasoning", "message"]),
        ("vllm/toolcall-required-stream.sse", None),
        ("vllm/chat-completion-stream-usage.sse", ["message"]),
    ],
)
def test_recorded_chats_become_responses(name: str, kinds: list[str] | None) -> None:
    _, _, body = recorded(name)
    found = events(through(change(), cut(body, range(0, len(body), 131))))
    check_order(found)
    response = found[-1]["response"]
    assert kinds is None or [item["type"] for item in response["output"]] == kinds
    assert "usage" not in name or response["usage"]["output_tokens"] > 0


@needs_recordings
def test_recorded_requests_mean_the_same_conversation() -> None:
    _, asked, _ = recorded("llamacpp/responses-tool-stream.sse")
    messages = to_chat(asked)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "get_weather"


@needs_recordings
@pytest.mark.parametrize(
    "name", ["llamacpp/responses-stream.sse", "llamacpp/responses-tool-stream.sse", "vllm/responses-stream.sse"]
)
def test_native_and_made_responses_have_the_same_fields(name: str) -> None:
    _, asked, body = recorded(name)
    native = gathered(ResponsesTurn("a", asked), ResponseMerge(), events(body))
    made = whole([chunk({"content": "x"}), chunk({}, "length"), usage(1, 1)])
    assert set(made) <= set(native)
