"""Names and aliases, the head of a body, and a model's request rules."""

from __future__ import annotations

import msgspec
import pytest

from offloadd.errors import RequestError
from offloadd.proxy.routing import Head, Names, apply_rules, check_backend, read_head, read_object
from offloadd.state.desired import DesiredState, ModelSpec, RequestRules
from offloadd.state.ids import BackendName, ModelName


def spec(name: str, *aliases: str) -> ModelSpec:
    return ModelSpec(name=ModelName(name), source="x.gguf", backends=(BackendName("llamacpp"),), aliases=aliases)


def names(*specs: ModelSpec) -> Names:
    return Names.of(DesiredState(models={each.name: each for each in specs}))


def refusal(action) -> RequestError:
    with pytest.raises(RequestError) as caught:
        action()
    return caught.value


def test_names_and_aliases() -> None:
    table = names(spec("qwen", "default"), spec("llama"))
    assert table.find("default").name == "qwen"
    assert table.find("llama").name == "llama"
    assert refusal(lambda: table.find(None)).code == "model_required"
    unknown = refusal(lambda: table.find("lama"))
    assert (unknown.status, unknown.code, unknown.param) == (404, "model_not_found", "model")
    assert "did you mean llama?" in unknown.message
    assert "GET /v1/models" in refusal(lambda: table.find("x" * 10_000)).message


def test_the_only_model_needs_no_name() -> None:
    assert names(spec("qwen")).find(None).name == "qwen"
    assert refusal(lambda: names().find(None)).status == 400


def test_heads() -> None:
    assert read_head(b'{"model": "a", "stream": true, "x": [1, {"model": 2}]}') == Head(model="a", stream=True)
    assert read_head(b'{"stream": null}') == Head()


@pytest.mark.parametrize("read", [read_head, read_object])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"x":' * 100_000, "invalid_json"),
        (b"[]", "invalid_body"),
        (b"null", "invalid_body"),
    ],
)
def test_bodies_that_are_none(read, body: bytes, code: str) -> None:
    error = refusal(lambda: read(body))
    assert (error.status, error.code) == (400, code)


@pytest.mark.parametrize("body", [b'{"x": "\xff"}', b'{"x": 1e999}'])
def test_what_the_head_skipped_is_still_refused(body: bytes) -> None:
    read_head(body)
    assert refusal(lambda: apply_rules(RequestRules(set={"top_k": 1}), body)).status == 400


def test_rules() -> None:
    rules = RequestRules(set={"a": 1}, default={"b": 2, "c": 2}, remove=("d",))
    assert msgspec.json.decode(apply_rules(rules, b'{"a": 0, "b": 0, "d": 0, "e": 0}')) == {"a": 1, "b": 0, "c": 2, "e": 0}
    body = b'{ "kept" :   "as it is" }'
    assert apply_rules(RequestRules(), body) is body


def test_engines_of_a_model() -> None:
    check_backend(spec("a"), None)
    check_backend(spec("a"), "llamacpp")
    assert refusal(lambda: check_backend(spec("a"), "vllm")).code == "backend_not_configured"
