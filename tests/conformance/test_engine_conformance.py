"""The suite of engine_suite.py for every adapter: with the real llama-server where there is one, and with the stand-ins always."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from offloadd.backends import discover
from offloadd.backends.custom import BACKEND as CUSTOM
from offloadd.state.desired import BackendKind, Engine, ModelSpec
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import ModelFacts
from offloadd.units import Bytes
from tests.conformance.engine_suite import Behind, EngineConformance
from tests.conformance.processes import STANDINS
from tests.conformance.servers import real, tiny_gguf

KNOBS = {"STANDIN_TOKEN_S": "0.003"}
SLOW = {"STANDIN_LOAD_S": "5"}


def behind(name: str, command: tuple[str, ...], folder: Path, model: Path | str, **more: Any) -> Behind:
    """A built-in engine with its server."""
    adapter = discover()[name]
    engine = Engine(name=BackendName(name), adapter=name, command=command)
    spec = ModelSpec(name=ModelName("tiny"), source=str(model), backends=(engine.name,), context=1024, parallel=2)
    return Behind(adapter, engine, spec, ModelFacts(path=str(model), size=Bytes(1)), folder, **more)


def standin(name: str) -> tuple[str, ...]:
    return (sys.executable, str(STANDINS / f"{name}.py"))


class TestLlamaServer(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        folder = tmp_path_factory.mktemp("llama")
        found = real(folder)
        if isinstance(found, str):
            pytest.skip(found)
        return behind("llamacpp", found.command, folder, found.model, env=found.env)


class TestLlamaStandIn(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        folder = tmp_path_factory.mktemp("llama")
        model = folder / "model.gguf"
        model.write_bytes(tiny_gguf())
        # It has no keys of its own: the real one shows that they work.
        return behind("llamacpp", standin("llama_server"), folder, model, env=KNOBS, slow=SLOW, keyed=False)


class TestVllmStandIn(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        command = (*standin("vllm_server"), "serve")
        return behind("vllm", command, tmp_path_factory.mktemp("vllm"), "org/model", env=KNOBS, slow=SLOW)


class TestTgiStandIn(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        folder = tmp_path_factory.mktemp("tgi")
        return behind("tgi", standin("tgi_launcher"), folder, "org/model", env=KNOBS, slow=SLOW, tells_models_apart=False)


class TestCustom(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def behind(cls, tmp_path_factory: pytest.TempPathFactory) -> Behind:
        folder = tmp_path_factory.mktemp("custom")
        model = folder / "model.gguf"
        model.write_bytes(tiny_gguf())
        command = (*standin("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}", "-np", "2")
        engine = Engine(name=BackendName("own"), adapter="custom", kind=BackendKind.CUSTOM, command=command)
        spec = ModelSpec(name=ModelName("tiny"), source=str(model), backends=(engine.name,), parallel=2)
        facts = ModelFacts(path=str(model), size=Bytes(1))
        return Behind(
            CUSTOM.bound(engine),
            engine,
            spec,
            facts,
            folder,
            env=KNOBS,
            slow=SLOW,
            keyed=False,
            tells_models_apart=False,
            explains_options=False,
        )
