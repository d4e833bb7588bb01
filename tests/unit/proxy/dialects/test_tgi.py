"""TGI's requests as text completions, and their chunks as TGI's tokens, held to TGI's own description of its API."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.errors import RequestError
from offloadd.proxy.dialects import tgi, turns
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, ModelName
from tests.unit.proxy.dialects.streams import RECORDINGS, cut, events, gathered, needs_recordings, recorded, stream, through, usage

Object = dict[str, Any]
SPEC = ModelSpec(name=ModelName("a"), source="a.gguf", backends=(BackendName("llamacpp"),), context=512)


def ask(**parameters: Any) -> tgi.Generate:
    return tgi.read({"inputs": "The sky is", "parameters": parameters})


def said(text: str, finish: str | None = None, **more: Any) -> Object:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}


def description(name: str) -> Object:
    """A schema of TGI's; `nullable` as JSON Schema says it."""
    schemas = json.loads((RECORDINGS.parent / "tgi-openapi.json").read_text())["components"]["schemas"]

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(each) for each in node]
        if not isinstance(node, dict):
            return node
        node = {key: plain(value) for key, value in node.items() if key not in ("default", "example", "format", "exclusiveMinimum")}
        return {"anyOf": [{**node, "nullable": False}, {"type": "null"}]} if node.pop("nullable", False) else node

    return {"$ref": f"#/components/schemas/{name}", "components": {"schemas": plain(schemas)}}


def test_parameters() -> None:
    body = tgi.to_completion(ask(max_new_tokens=9, stop=["x"], repetition_penalty=1.1, seed=3, top_p=0.5, do_sample=True), SPEC)
    assert body == {
        "prompt": "The sky is",
        "max_tokens": 9,
        "stop": ["x"],
        "repeat_penalty": 1.1,
        "repetition_penalty": 1.1,
        "seed": 3,
        "top_p": 0.5,
        "logprobs": 1,
        "return_token_ids": True,
    }
    assert tgi.to_completion(ask(), SPEC)["temperature"] == 0
    assert tgi.to_completion(ask(), SPEC)["max_tokens"] == 256
    assert "temperature" not in tgi.to_completion(ask(do_sample=True), SPEC)
    assert tgi.to_completion(ask(top_n_tokens=4), SPEC)["logprobs"] == 4


@pytest.mark.parametrize("kind", ["json", "json_schema"])
def test_grammars(kind: str) -> None:
    schema = {"type": "object"}
    value = {"name": "x", "schema": schema} if kind == "json_schema" else schema
    assert tgi.to_completion(ask(grammar={"type": kind, "value": value}), SPEC)["json_schema"] == schema


@pytest.mark.parametrize(
    "parameters",
    [
        {"truncate": 5},
        {"watermark": True},
        {"best_of": 2},
        {"grammar": {"type": "regex", "value": "x"}},
        {"decoder_input_details": True},
    ],
)
def test_what_only_tgi_can_do(parameters: Object) -> None:
    with pytest.raises(RequestError) as caught:
        tgi.to_completion(ask(**parameters), SPEC)
    assert caught.value.code == "unsupported_capability"


@pytest.mark.parametrize(
    "wrong", [{}, {"inputs": 3}, {"inputs": "x", "parameters": {"max_new_tokens": 0}}, {"inputs": "x", "parameters": {"stop": "x"}}]
)
def test_what_is_wrong_is_refused(wrong: Object) -> None:
    with pytest.raises(RequestError) as caught:
        tgi.read(wrong)
    assert caught.value.status == 400


def test_tokens_of_every_shape() -> None:
    llama = said(
        " blue",
        logprobs={
            "content": [{"id": 7, "token": " blue", "logprob": -0.5, "top_logprobs": [{"id": 8, "token": " red", "logprob": -1}]}]
        },
    )
    vllm = said(" and", logprobs={"tokens": [" and"], "token_logprobs": [-0.25], "top_logprobs": [{" or": -2.0}]}, token_ids=[9])
    chunks = [llama, vllm, said("x"), said("", "length"), usage(4, 3)]
    asked = ask(top_n_tokens=1, details=True, return_full_text=True)
    *tokens, last = events(
        through(turns.TurnStream(tgi.GenerateTurn(asked), turns.as_events, "text/event-stream"), [stream(chunks)])
    )
    assert [(event["index"], event["token"]["id"], event["token"]["text"], event["token"]["logprob"]) for event in tokens] == [
        (1, 7, " blue", -0.5),
        (2, 9, " and", -0.25),
        (3, 0, "x", None),
    ]
    assert [event.get("top_tokens", [{}])[0].get("text") for event in tokens] == [" red", " or", None]
    assert last["generated_text"] == "The sky is blue andx"
    assert last["details"] == {"finish_reason": "length", "generated_tokens": 3, "seed": None, "input_length": 4}
    assert last["token"]["special"]
    whole = gathered(tgi.GenerateTurn(asked), tgi.GenerateMerge(asked), chunks)
    assert [token["text"] for token in whole["details"]["tokens"]] == [" blue", " and", "x"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"finish": "stop"}, "eos_token"),
        ({"finish": "length"}, "length"),
        ({"finish": "stop", "stop_reason": "."}, "stop_sequence"),
    ],
)
def test_reasons(choice: Object, reason: str) -> None:
    asked = ask(details=True)
    whole = gathered(tgi.GenerateTurn(asked), tgi.GenerateMerge(asked), [said("x", **choice)])
    assert whole["details"]["finish_reason"] == reason


def test_without_details() -> None:
    asked = ask()
    assert gathered(tgi.GenerateTurn(asked), tgi.GenerateMerge(asked), [said("x", "stop")]) == {"generated_text": "x"}


@needs_recordings
@given(cuts=st.lists(st.integers(0, 100_000), max_size=20))
def test_recorded_streams_have_tgis_shape(cuts: list[int]) -> None:
    for name in ("llamacpp/completion-openai-stream.sse", "vllm/completion-stream.sse"):
        _, _, body = recorded(name)
        change = turns.TurnStream(tgi.GenerateTurn(ask(details=True)), turns.as_events, "text/event-stream")
        found = events(through(change, cut(body, cuts)))
        assert found[-1]["generated_text"] == "".join(event["token"]["text"] for event in found)


@needs_recordings
def test_answers_are_as_tgi_describes_them() -> None:
    chunks = [said(" blue", logprobs={"content": [{"id": 7, "token": " blue", "logprob": -0.5}]}), said("", "stop"), usage(4, 1)]
    asked = ask(details=True, top_n_tokens=1)
    whole = gathered(tgi.GenerateTurn(asked), tgi.GenerateMerge(asked), chunks)
    jsonschema.validate(whole, description("GenerateResponse"))
    for event in events(through(turns.TurnStream(tgi.GenerateTurn(asked), turns.as_events, "text/event-stream"), [stream(chunks)])):
        jsonschema.validate(event, description("StreamResponse"))
    jsonschema.validate(tgi.info(SPEC, "1"), description("Info"))
    (error,) = tgi.GenerateTurn(asked).refuse(RequestError(500, "x", "boom"))
    jsonschema.validate(error, description("ErrorResponse"))
