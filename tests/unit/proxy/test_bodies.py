"""What an engine gets: the client's bytes, unless the config or the engine's name for the model say otherwise."""

from __future__ import annotations

import json

import pytest

from offloadd.errors import RequestError
from offloadd.proxy import speech
from offloadd.proxy.bodies import Body
from offloadd.state.desired import ModelSpec, RequestRules
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import EngineApi

SPEC = ModelSpec(name=ModelName("a"), source="a.gguf", backends=(BackendName("llamacpp"), BackendName("vllm")))
ANY, NAMED = EngineApi(), EngineApi(model="org/real")
RAW = b'{ "model":"alias", "deep": {"x":[1.10, "\\u00e9"]}, "backend":"vllm"}'


def test_the_same_bytes_for_an_engine_that_looks_at_no_name() -> None:
    assert Body.read(RAW, "application/json").for_engine(ANY) is RAW


def test_the_name_that_the_engine_checks() -> None:
    found = Body.read(RAW, "text/plain").for_engine(NAMED)
    assert json.loads(found) == {"model": "org/real", "deep": {"x": [1.1, "é"]}}
    assert b'{"x":[1.10, "\\u00e9"]}' in found  # what is not looked at stays as it was written
    exact = b'{"model": "org/real"}'
    assert Body.read(exact, "").for_engine(NAMED) is exact


def test_rules_apply_to_json() -> None:
    spec = ModelSpec(name=SPEC.name, source="", backends=SPEC.backends, request=RequestRules(set={"top_k": 1}))
    assert json.loads(Body.read(b'{"model": "a"}', "").ruled(spec).for_engine(NAMED)) == {"model": "org/real", "top_k": 1}


def test_a_form_with_another_name() -> None:
    fields = (("model", "alias"), ("stream", "true"))
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    raw = "".join([*parts, "--b--\r\n"]).encode()
    body = Body.read(raw, "multipart/form-data; boundary=b")
    assert (body.head.model, body.head.stream) == ("alias", True)
    assert body.for_engine(ANY) is raw
    assert body.for_engine(NAMED) == raw.replace(b"alias", b"org/real")


def apis(spec: ModelSpec, name: BackendName) -> EngineApi:
    paths = frozenset({"/v1/chat/completions"} | ({"/v1/embeddings"} if name == "vllm" else set()))
    return EngineApi(paths=paths, hints={"/v1/rerank": f"{name}.reranking: true"})


def test_a_missing_ability_is_refused_by_name() -> None:
    speech.check_spoken(SPEC, apis, "/v1/embeddings")
    with pytest.raises(RequestError, match=r"a does not offer reranking.*llamacpp, vllm.*vllm\.reranking: true") as caught:
        speech.check_spoken(SPEC, apis, "/v1/rerank")
    assert (caught.value.status, caught.value.code) == (400, "unsupported_capability")


def test_the_first_path_that_an_engine_has() -> None:
    api = apis(SPEC, BackendName("vllm"))
    assert speech.speaks(SPEC, api, "/v1/messages", "/v1/chat/completions") == "/v1/chat/completions"
    with pytest.raises(RequestError, match="speech"):
        speech.speaks(SPEC, api, "/v1/audio/speech")
