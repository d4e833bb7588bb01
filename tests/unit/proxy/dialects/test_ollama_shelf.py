"""Ollama's lists, made from the state of the daemon."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from offloadd.proxy.dialects import ollama_shelf
from offloadd.state.desired import RunMode
from offloadd.state.launch import EngineApi, ModelFacts
from offloadd.state.observed import InstanceState
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes, Seconds
from tests.unit.api.test_views import gpu, on_gpu, picture
from tests.unit.plan.build import NOW, gib, offer, spec

SHAPE = ModelShape(
    architecture="llama", parameters=134_515_008, quantization="Q4_1", context_train=8192, embedding=576, chat_template=True
)
FACTS = ModelFacts(identity="file-1", size=Bytes(98_000_000), shape=SHAPE)
KNOWN = replace(offer(1), facts=FACTS)


def test_tags_are_what_may_run() -> None:
    shown = picture(model=spec("a"), offers=(KNOWN,))
    (entry,) = ollama_shelf.tags(shown)["models"]
    assert (entry["name"], entry["model"], entry["size"]) == ("a", "a", 98_000_000)
    assert entry["details"]["parameter_size"] == "134.5M"
    assert entry["details"]["quantization_level"] == "Q4_1"
    assert len(entry["digest"]) == 64
    assert datetime.fromisoformat(entry["modified_at"])
    assert ollama_shelf.tags(picture(model=spec("a", run=RunMode.NEVER)))["models"] == []


def test_a_file_that_could_not_be_read_has_empty_details() -> None:
    (entry,) = ollama_shelf.tags(picture(model=spec("a")))["models"]
    assert (entry["size"], entry["details"]["family"], entry["details"]["parameter_size"]) == (0, "", "")


@pytest.mark.parametrize(("idle", "expires"), [(600, 10_600), (0, 10_000 + 100 * 365 * 86400)])
def test_what_is_loaded_and_until_when(idle: float, expires: float) -> None:
    model = spec("a", idle_timeout=Seconds(idle), context=4096)
    views = (on_gpu("a-1", 6, 5, spec=model, ready_at=NOW), on_gpu("a-2", 6, 5, InstanceState.LOADING), on_gpu("gone-1", 1, 1))
    (entry,) = ollama_shelf.running(picture(gpu(), instances=views, model=model, offers=(KNOWN,)))["models"]
    assert (entry["name"], entry["context_length"]) == ("a", 4096)
    assert (entry["size"], entry["size_vram"]) == (gib(6), gib(6))
    assert datetime.fromisoformat(entry["expires_at"]).timestamp() == pytest.approx(expires)


@pytest.mark.parametrize(
    ("api", "can"),
    [
        (EngineApi(), ["completion", "tools"]),
        (
            EngineApi(paths=frozenset({"/v1/chat/completions", "/v1/embeddings"}), images=True),
            ["completion", "tools", "vision", "embedding"],
        ),
    ],
)
def test_one_in_full(api: EngineApi, can: list[str]) -> None:
    model = spec("a", context=2048)
    shown: dict[str, Any] = ollama_shelf.show(picture(model=model, offers=(KNOWN,)), model, lambda *_: api)
    assert shown["model_info"]["general.architecture"] == "llama"
    assert shown["model_info"]["llama.context_length"] == 8192
    assert shown["parameters"] == "num_ctx 2048"
    assert shown["capabilities"] == can
