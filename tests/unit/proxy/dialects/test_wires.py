"""Engines with JSON of their own: what they are asked, and what their answers become, wherever those are cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS, Collector
from offloadd.proxy.dialects.openai_streams import put_right, repair
from offloadd.proxy.dialects.wires import Exchanged, to_engine
from offloadd.state.launch import EngineApi
from offloadd.state.wire import Answer, Framing, Messages, Streamed, Turns, Wire
from tests.unit.proxy.dialects.streams import cut, events, through

Object = dict[str, Any]
TURNS = Turns(system="[${text}]", user="U: ${text}\n", assistant="A: ${text}\n", open="A:")
COUNTS: Any = {"prompt_tokens": ("n", "in"), "completion_tokens": ("n", "out")}
WHOLE = Answer(text=("out", "0", "said"), finish_reason=("why",), error=("bad",), **COUNTS)
LINES = Streamed(
    framing=Framing.NDJSON, switch=("flow",), text=("bit",), finish_reason=("why",), done=("over",), error=("bad",), **COUNTS
)
EVENTS = Streamed(framing=Framing.SSE, path="/pour", grows=True, text=("all",), finish_reason=("why",), error=("bad",), **COUNTS)
WIRE = Wire(
    path="/say",
    prompt=("words",),
    turns=TURNS,
    model=("who",),
    parameters={"max_tokens": ("knobs", "limit"), "stop": ("knobs", "until")},
    body={"knobs": {"seed": 1}, "list": [{}]},
    answer=WHOLE,
    stream=LINES,
    finish_reasons={"ran out": "length"},
)
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
LOOSE = EngineApi(exact=False)


def chat(**more: Any) -> Object:
    return {"model": "m", "messages": HELLO, **more}


def asked_of(exchanged: Exchanged) -> Object:
    return dict(json.loads(exchanged.body))


def out_of(exchanged: Exchanged, pieces: Iterable[bytes]) -> bytes:
    """All that comes out for these pieces."""
    return b"".join(map(exchanged.feed, pieces)) + exchanged.end()


# --- what is asked ---


def test_each_thing_goes_to_its_place() -> None:
    asked = asked_of(Exchanged(WIRE, CHAT, chat(max_tokens=7, stop="x", temperature=0.5, user="u"), 0))
    assert asked == {
        "words": "[be brief]U: hi\nA:",
        "who": "m",
        "knobs": {"seed": 1, "limit": 7, "until": ["x"]},
        "list": [{}],
        "flow": False,
    }
    assert WIRE.body == {"knobs": {"seed": 1}, "list": [{}]}


def test_a_stream_is_asked_for_by_switch_or_path() -> None:
    by_switch = Exchanged(WIRE, COMPLETIONS, {"prompt": "a", "stream": True}, 0)
    assert (by_switch.path, asked_of(by_switch)["flow"]) == ("/say", True)
    poured = replace(WIRE, stream=EVENTS)
    assert Exchanged(poured, COMPLETIONS, {"prompt": "a", "stream": True}, 0).path == "/pour"
    assert Exchanged(poured, COMPLETIONS, {"prompt": "a"}, 0).path == "/say"


def test_one_that_only_streams_is_always_asked_for_a_stream() -> None:
    assert asked_of(Exchanged(replace(WIRE, answer=None), CHAT, chat(), 0))["flow"] is True


def test_messages_are_spelled_as_the_engine_spells_them() -> None:
    shape = Messages(at=("talk",), role="by", content="line", roles={"user": "human", "assistant": "bot"}, system=("law",))
    wire = replace(WIRE, turns=None, messages=shape)
    turns = [
        *HELLO,
        {"role": "assistant", "content": "ho"},
        {"role": "developer", "content": "more"},
        {"role": "user", "content": None},
    ]
    asked = to_engine(wire, CHAT, {"messages": turns}, stream=False)
    assert asked["law"] == "be brief\n\nmore"
    assert asked["talk"] == [{"by": "human", "line": "hi"}, {"by": "bot", "line": "ho"}, {"by": "human", "line": ""}]
    among = to_engine(replace(wire, messages=replace(shape, system=None)), CHAT, {"messages": HELLO}, stream=False)
    assert among["talk"][0] == {"by": "system", "line": "be brief"}


def test_text_that_looks_like_a_placeholder_is_left_alone() -> None:
    said = [{"role": "user", "content": "${text} and ${text}"}, {"role": "user", "content": "b"}]
    assert to_engine(WIRE, CHAT, {"messages": said}, stream=False)["words"] == "U: ${text} and ${text}\nU: b\nA:"


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"n": 2},
        {"best_of": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"json_schema": {}, "grammar": "root ::="},
        {"modalities": ["text", "audio"]},
        {"messages": [{"role": "tool", "content": "5"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    ],
)
def test_what_it_cannot_do_is_refused_by_name(more: Object) -> None:
    with pytest.raises(RequestError, match="does not offer") as refused:
        Exchanged(WIRE, CHAT, chat(**more), 0)
    assert (refused.value.status, refused.value.code) == (400, "unsupported_capability")


@pytest.mark.parametrize(
    "more",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [5]},
        {"messages": [{"role": "king", "content": ""}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
)
def test_what_is_no_conversation_is_refused(more: Object) -> None:
    with pytest.raises(RequestError) as refused:
        Exchanged(WIRE, CHAT, chat(**more), 0)
    assert (refused.value.status, refused.value.code) == (400, "invalid_body")


def test_stop_is_refused_where_it_has_no_place_since_the_answer_would_be_another() -> None:
    without = replace(WIRE, parameters={})
    with pytest.raises(RequestError, match="stop"):
        Exchanged(without, CHAT, chat(stop=["x"]), 0)
    assert "knobs" in asked_of(Exchanged(without, CHAT, chat(stop=[], max_tokens=5, tools=[]), 0))


def test_a_chat_or_a_text_that_it_has_no_place_for_is_refused() -> None:
    with pytest.raises(RequestError, match="does not offer chat"):
        Exchanged(replace(WIRE, turns=None), CHAT, chat(), 0)
    with pytest.raises(RequestError, match="does not offer text completions"):
        Exchanged(replace(WIRE, prompt=None, turns=None, messages=Messages(at=("m",))), COMPLETIONS, {"prompt": "a"}, 0)


# --- what is answered ---

ENDINGS = {"ran out": "length", "length": "length", "stop": "stop", "eos": "stop", None: "stop"}


def whole_of(text: str, why: str | None) -> bytes:
    return json.dumps({"out": [{"said": text}], "why": why, "n": {"in": 3, "out": 2}, "bad": None}).encode()


def stream_of(shape: Streamed, pieces: list[str], why: str | None) -> bytes:
    """What an engine with this shape sends; ends without a line break, as some do."""
    sofar = list(itertools.accumulate(pieces)) if shape.grows else pieces
    told: list[Object] = [{shape.text[0]: piece, "over": False, "bad": ""} for piece in sofar]
    told.append({"over": True, "why": why or "stop", "n": {"in": 3, "out": 2}})
    if shape.framing is Framing.NDJSON:
        return "\n".join(json.dumps(each) for each in told).encode()
    return b": hello\r\n\r\n" + b"".join(b"event: x\r\ndata:%b\r\n\r\n" % json.dumps(each).encode() for each in told)[:-4]


@given(
    st.lists(st.text(min_size=1), max_size=6),
    st.sampled_from(sorted(ENDINGS, key=str)),
    st.sampled_from([CHAT, COMPLETIONS]),
    st.sampled_from([LINES, EVENTS]),
    st.sets(st.integers(0, 2000), max_size=12),
    st.booleans(),
)
def test_an_answer_is_the_same_whole_and_streamed_wherever_it_is_cut(
    pieces: list[str], why: str | None, path: str, shape: Streamed, cuts: set[int], only_streams: bool
) -> None:
    """Text, reason and counts reach clients that want a stream and those that do not, whatever the engine gives."""
    streaming = replace(WIRE, stream=shape, answer=None if only_streams else WHOLE)
    silent = replace(WIRE, stream=None)
    asked = chat() if path == CHAT else {"model": "m", "prompt": "hi"}
    text = "".join(pieces)
    flow, whole = cut(stream_of(shape, pieces, why), cuts), cut(whole_of(text, why), cuts)
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}

    for wire, sent in ((streaming, flow), (silent, whole)):
        out = out_of(Exchanged(wire, path, {**asked, "stream": True}, 1234), sent)
        change = repair(path, LOOSE, None, "m", "id-1")
        assert change is not None
        chunks = events(through(change, [out]))
        collector = Collector(path)
        for each in chunks:
            collector.add(each)
        assert collector.complete
        assert {each["created"] for each in chunks} == {1234}
        assert_says(collector.answer(), path, text, ENDINGS[why], usage)

    for wire, sent in ((streaming, flow if only_streams else whole), (silent, whole)):
        out = out_of(Exchanged(wire, path, asked, 1234), sent)
        assert_says(put_right(path, sse.decode(out), "m", "id-1"), path, text, ENDINGS[why], usage)


def assert_says(answer: Object, path: str, text: str, reason: str, usage: Object) -> None:
    (choice,) = answer["choices"]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == text
    assert choice["finish_reason"] == reason
    assert answer["usage"] == usage
    assert answer["object"] == ("chat.completion" if path == CHAT else "text_completion")


def test_the_first_words_do_not_wait_for_the_last() -> None:
    exchanged = Exchanged(WIRE, CHAT, chat(stream=True), 0)
    (role, first) = events(exchanged.feed(b'{"bit":"a"}\n{"bi'))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["delta"] == {"content": "a"}
    assert events(exchanged.feed(b't":"b"}\n'))[0]["choices"][0]["delta"] == {"content": "b"}


@pytest.mark.parametrize(
    ("shape", "sent"),
    [
        (LINES, b'{"bit":"a"}\n{"bit":"b","why":"stop"}\n'),  # its last event has not come
        (EVENTS, b'data: {"all":"a"}\n\n'),  # nor its reason
        (replace(LINES, done=None), b'{"bit":"a"}\n'),
    ],
)
def test_a_stream_that_was_cut_is_no_answer(shape: Streamed, sent: bytes) -> None:
    wire = replace(WIRE, stream=shape)
    change = repair(CHAT, LOOSE, None, "m", "x")
    assert change is not None
    change.feed(out_of(Exchanged(wire, CHAT, chat(stream=True), 0), [sent]))
    with pytest.raises(sse.CutStreamError):
        change.end()
    with pytest.raises(sse.CutStreamError):
        out_of(Exchanged(replace(wire, answer=None), CHAT, chat(), 0), [sent])


def test_a_stream_without_a_word_for_its_end_is_whole_at_its_end() -> None:
    shape = Streamed(framing=Framing.NDJSON, text=("bit",))
    out = out_of(Exchanged(replace(WIRE, stream=shape, answer=None), CHAT, chat(), 0), [b'{"bit":"a"}\n'])
    answer = sse.decode(out)
    assert answer["choices"][0] == {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    assert "usage" not in answer


@pytest.mark.parametrize("said", ['"no memory"', '{"code": 5}'])
def test_an_error_in_an_answer_is_an_error(said: str) -> None:
    sent = f'{{"bit":"a"}}\n{{"bad":{said}}}\n{{"bit":"b","over":true}}\n'.encode()
    told = events(out_of(Exchanged(WIRE, CHAT, chat(stream=True), 0), [sent]))
    assert said.strip('"').replace(" ", "") in told[-1]["error"]["message"].replace(" ", "")
    assert not any(each.get("choices", [{}])[0].get("delta") == {"content": "b"} for each in told)
    with pytest.raises(RequestError) as failed:
        out_of(Exchanged(WIRE, CHAT, chat(), 0), [f'{{"bad":{said}}}'.encode()])
    assert failed.value.status == 500


@pytest.mark.parametrize(
    ("wire", "sent"),
    [
        (replace(WIRE, stream=None), b'{"out":[]}'),
        (replace(WIRE, stream=None), b'{"out":[{"said":5}]}'),
        (replace(WIRE, stream=None), b"<html>"),
        (replace(WIRE, stream=None), b""),
        (WIRE, b'{"bit":["a"]}\n'),
        (WIRE, b"nonsense\n"),
        (WIRE, b'"text"\n\xff\xfe\n'),
        (replace(WIRE, stream=EVENTS), b'data: {"all":"ab"}\n\ndata: {"all":"ax"}\n\n'),
    ],
)
def test_what_is_not_as_declared_is_not_understood(wire: Wire, sent: bytes) -> None:
    with pytest.raises(sse.BrokenStreamError):
        out_of(Exchanged(wire, CHAT, chat(stream=True), 0), [sent])


def test_an_event_without_end_is_bounded() -> None:
    exchanged = Exchanged(WIRE, CHAT, chat(stream=True), 0)
    for _ in range(8):
        assert exchanged.feed(b"x" * 2**20) == b""
    with pytest.raises(sse.BrokenStreamError, match="more than"):
        exchanged.feed(b"x")


def test_a_refusal_in_its_own_words_is_read() -> None:
    exchanged = Exchanged(WIRE, CHAT, chat(), 0)
    assert json.loads(exchanged.refusal(b'{"bad":"too much"}')) == {"error": {"message": "too much"}}
    streaming = Exchanged(replace(WIRE, stream=replace(LINES, error=None)), CHAT, chat(stream=True), 0)
    assert json.loads(streaming.refusal(b'{"bad":"too much"}')) == {"error": {"message": "too much"}}
    for other in (b'{"error":"x"}', b"<html>", b"", b"[]"):
        assert exchanged.refusal(other) == other


@given(st.binary(max_size=300), st.sampled_from([WIRE, replace(WIRE, stream=EVENTS), replace(WIRE, stream=None)]), st.booleans())
def test_whatever_an_engine_sends_only_the_known_errors_come_of_it(sent: bytes, wire: Wire, stream: bool) -> None:
    try:
        out_of(Exchanged(wire, CHAT, chat(stream=stream), 0), [sent])
    except (sse.BrokenStreamError, RequestError):
        pass
