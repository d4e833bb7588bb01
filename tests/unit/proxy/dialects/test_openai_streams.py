"""OpenAI's own words where engines stray from them: streams, responses and forms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse, turns
from offloadd.proxy.dialects.multipart import Form, is_form
from offloadd.proxy.dialects.openai import CHAT, Collector
from offloadd.proxy.dialects.openai_streams import put_right, repair
from offloadd.proxy.dialects.responses import ResponseMerge, ResponsesTurn
from offloadd.state.launch import EngineApi
from tests.unit.proxy.dialects.streams import chunk, cut, events, gathered, needs_recordings, recorded, stream, through, usage

Object = dict[str, Any]
EXACT, LOOSE = EngineApi(), EngineApi(exact=False)


def test_what_is_right_goes_by_untouched() -> None:
    assert repair(CHAT, EXACT, None, "a", "x") is None
    assert repair(CHAT, EXACT, 1, "a", "x") is None
    assert repair("/v1/embeddings", LOOSE, None, "a", "x") is None
    assert repair(CHAT, EXACT, 2, "a", "x") is not None


@needs_recordings
def test_two_choices_have_one_usage() -> None:
    _, asked, body = recorded("llamacpp/chat-completion-n2-stream.sse")
    assert asked["n"] == 2
    change = repair(CHAT, EXACT, 2, "a", "x")
    assert change
    found = events(out := through(change, cut(body, range(0, len(body), 71))))
    assert out.endswith(sse.DONE)
    counts = [event["usage"] for event in found if event.get("usage")]
    assert counts == [found[-1]["usage"]]
    assert (counts[0]["completion_tokens"], counts[0]["total_tokens"]) == (8, 34)
    collector = Collector(CHAT, 2)
    for event in events(body):
        collector.add(event)
    assert collector.complete
    answer = collector.answer()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 8


def test_names_ids_and_reasons_of_a_foreign_engine() -> None:
    chunks = [
        {
            "id": "",
            "model": "org/real",
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": "x"}, "finish_reason": None}],
        },
        {"id": "", "model": "org/real", "choices": [{"index": 0, "delta": {"content": "y"}, "finish_reason": "eos_token"}]},
        {"id": "", "model": "org/real", **usage(3, 2)},
    ]
    change = repair(CHAT, LOOSE, None, "a", "chatcmpl-1")
    assert change
    found = events(through(change, [stream(chunks)]))
    assert {(event["id"], event["model"]) for event in found} == {("chatcmpl-1", "a")}
    assert found[1]["choices"][0]["finish_reason"] == "stop"
    assert found[2]["usage"]["completion_tokens"] == 2
    whole = put_right(CHAT, {"id": "", "model": "org/real", "choices": [{"finish_reason": "stop_sequence"}]}, "a", "chatcmpl-1")
    assert (whole["id"], whole["model"], whole["choices"][0]["finish_reason"]) == ("chatcmpl-1", "a", "stop")


@needs_recordings
def test_a_bare_proxy_error_is_no_end() -> None:
    _, _, body = recorded("llamacpp/router-chat-stream-child-killed.sse")
    assert b"proxy error" in body
    change = repair(CHAT, LOOSE, None, "a", "x")
    assert change
    out = change.feed(body)
    assert b"proxy error" not in out
    with pytest.raises(sse.CutStreamError):
        change.end()
    told = change.fail(RequestError(502, "bad_answer", "it broke off"))
    assert events(told)[0]["error"]["message"] == "it broke off"
    assert sse.DONE not in out + told


@needs_recordings
def test_an_engine_that_dies_leaves_an_error_and_no_end() -> None:
    _, _, body = recorded("vllm/chat-completion-stream-engine-killed.sse")
    change = repair(CHAT, LOOSE, None, "a", "x")
    assert change
    body = body[body.index(b'data: {"error"') :]  # of what came before, the recorder kept a part
    out = through(change, cut(body, range(0, len(body), 17)))
    assert events(out)[-1]["error"]["code"] == "backend_error"
    assert sse.DONE not in out


# --- responses ---


@needs_recordings
@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("llamacpp/responses-stream.sse", "incomplete"),
        ("llamacpp/reasoning-responses-stream.sse", "completed"),
        ("vllm/responses-stream.sse", "incomplete"),
    ],
)
def test_responses_are_numbered_and_end_as_they_are(name: str, status: str) -> None:
    _, asked, body = recorded(name)
    change = turns.TurnStream(ResponsesTurn("a", asked), turns.as_named_events, "text/event-stream")
    found = events(through(change, cut(body, range(0, len(body), 89))))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[-1]["type"] == f"response.{status}"
    for event in found:
        if "item" in event or "item_id" in event:
            assert event["output_index"] == 0
        if event["type"].startswith(("response.output_text", "response.content_part")):
            assert event["content_index"] == 0
        if "response" in event:
            assert event["response"]["model"] == "a"
            assert isinstance(event["response"]["output"], list)
    whole = gathered(ResponsesTurn("a", asked), ResponseMerge(), events(body))
    assert whole["status"] == status
    assert whole["usage"]["output_tokens"] > 0
    assert (whole["incomplete_details"] is None) is (status == "completed")


def test_a_response_that_failed_is_an_error() -> None:
    failed = {
        "type": "response.failed",
        "response": {"id": "r", "status": "failed", "error": {"code": "server_error", "message": "boom"}},
    }
    with pytest.raises(RequestError, match="boom"):
        gathered(ResponsesTurn("a", {}), ResponseMerge(), [failed])


# --- forms ---

FORM = "multipart/form-data; boundary=----b7"


def form(*parts: tuple[str, bytes], end: bytes = b"------b7--\r\n") -> bytes:
    return (
        b"".join(
            b"------b7\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + body + b"\r\n" for head, body in parts
        )
        + end
    )


@given(sound=st.binary(max_size=300), name=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9))
def test_the_model_of_a_form_is_found_beside_any_file(sound: bytes, name: str) -> None:
    body = form(('name="file"; filename="a.wav"', sound), ('name="model"', name.encode()), ('name="language"', b"en"))
    found = Form(body, FORM)
    assert (found.text("model"), found.text("language"), found.text("none")) == (name, "en", None)
    assert Form(found.replaced("model", "longer-name"), FORM).text("model") == "longer-name"
    assert found.replaced("model", name) == body
    assert sound in found.replaced("model", "x")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", form()),
        (FORM, b"{}"),
        (FORM, form(('name="a"', b"x"), end=b"")[:-2]),
        (FORM, form(*[('name="a"', b"x")] * 200)),
        (FORM, b"------b7\r\nno end of the head"),
    ],
)
def test_a_form_that_is_none(content_type: str, body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        Form(body, content_type)
    assert caught.value.status == 400


def test_what_is_a_form() -> None:
    assert is_form("Multipart/Form-Data; boundary=x")
    assert not is_form("application/json")
    assert chunk({"content": "x"})["choices"]
