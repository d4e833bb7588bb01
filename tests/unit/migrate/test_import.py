"""Configs of other programs: what becomes of them, and that `offloadd check` has nothing against it.

`OFFLOADD_WRITE_EXPECTED=1 pytest tests/unit/migrate` writes the expected texts anew; read the difference before keeping it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from offloadd.backends import discover
from offloadd.cli import app
from offloadd.config import SourceText, SystemSecrets, load
from offloadd.errors import OffloaddError, PermanentError
from offloadd.migrate.command_line import parse
from offloadd.migrate.llama_swap import import_llama_swap
from offloadd.migrate.ollama import import_ollama
from offloadd.migrate.presets import import_presets
from offloadd.migrate.report import Migration
from offloadd.state.desired import DesiredState
from offloadd.state.ids import ModelName

SAMPLES = Path(__file__).parents[2] / "samples/import"
KEYS = {"SWAP_KEY": "a-key-of-some-length", "SWAP_MODELS": "/models"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def desired(made: Migration) -> DesiredState:
    """What it means; it must be without an error."""
    loaded = load([SourceText("new", made.text())], backends=discover(), secrets=SystemSecrets())
    assert loaded.ok, loaded.render()
    assert loaded.desired is not None
    return loaded.desired


def compare(made: Migration, expected: Path) -> None:
    text = made.text().replace(f"{SAMPLES}/", "")
    if os.environ.get("OFFLOADD_WRITE_EXPECTED"):
        expected.write_text(text)
    assert text == expected.read_text()


def test_llama_swap() -> None:
    made = import_llama_swap(SAMPLES / "llama-swap.yaml")
    compare(made, SAMPLES / "llama-swap.expected")
    coder = desired(made).models[ModelName("coder-7b")]
    assert (coder.source, coder.context, coder.parallel, coder.devices) == ("/models/coder.gguf", 8192, 4, ("0", "1"))
    assert coder.aliases == ("Coder-7B", "gpt-4o", "coder", "Coder-7B:hot")
    assert coder.priority == 70
    assert desired(made).models[ModelName("embed")].pinned


def test_every_key_is_carried_or_listed_with_its_line() -> None:
    path = SAMPLES / "llama-swap.yaml"
    made = import_llama_swap(path)
    told = {left.mark.line for left in made.left}
    lines = path.read_text().splitlines()
    for key in (
        "logLevel",
        "startPort",
        "sendLoadingState",
        "name: The",
        "metadata",
        "surprise",
        "both",
        'cmd: llama-server "un',
        "big:",
    ):
        (number,) = [number for number, line in enumerate(lines, 1) if key in line]
        assert number in told, key
    whole = made.text()
    assert all(f"{left.mark.line}: {left.key}" in whole for left in made.left)


def test_newer_files_have_groups_elsewhere(tmp_path: Path) -> None:
    config = {
        "models": {"a": {"cmd": "llama-server -m a.gguf -c 1 -np 1"}, "b": {"cmd": "llama-server -m b.gguf -c 1 -np 1"}},
        "routing": {
            "router": {"use": "group", "settings": {"groups": {"g": {"persistent": True, "members": ["a"]}}, "matrix": {}}},
            "scheduler": {"use": "fifo"},
        },
        "selectors": {"x": {"strategy": "pin", "targets": ["b"]}, "y": {"strategy": "warm", "targets": ["a", "b"]}},
        "profiles": {},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    made = import_llama_swap(tmp_path / "c.yaml")
    models = desired(made).models
    assert models[ModelName("a")].pinned
    assert models[ModelName("b")].aliases == ("x",)
    assert {left.key for left in made.left} == {
        "profiles",
        "routing.router.settings.matrix",
        "routing.scheduler",
        "selectors.y",
    }


def test_presets() -> None:
    made = import_presets(SAMPLES / "presets.ini")
    compare(made, SAMPLES / "presets.expected")
    small = desired(made).models[ModelName("ggml-org-small-q8_0")]
    assert (small.context, small.parallel, small.gpu_layers, small.run) == (2048, 2, "all", "always")
    assert small.args == ("--jinja", "--no-mmap")
    with pytest.raises(PermanentError, match=r"neither a .section. nor key"):
        import_presets(SAMPLES / "Modelfile")


def test_a_modelfile(tmp_path: Path) -> None:
    folder = tmp_path / "terse"
    folder.mkdir()
    (folder / "Modelfile").write_text((SAMPLES / "Modelfile").read_text())
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    made = import_ollama(folder / "Modelfile")
    model = desired(made).models[ModelName("terse")]
    assert (model.source, model.context, model.devices) == (str(folder / "tiny.gguf"), 16384, "cpu")
    assert model.request.default == {"temperature": 0.3, "stop": ["<|end|>", "###"]}
    assert [(left.mark.line, left.key) for left in made.left] == [
        (9, "terse: SYSTEM"),
        (11, "terse: TEMPLATE"),
        (1, "terse: unheard"),
    ]


def store(folder: Path, models: dict[str, dict[str, bytes]]) -> Path:
    """A store of Ollama: manifests that name blobs."""
    (folder / "blobs").mkdir(parents=True)
    for name, layers in models.items():
        listed: list[dict[str, Any]] = []
        for kind, content in layers.items():
            digest = hashlib.sha256(content).hexdigest()
            (folder / f"blobs/sha256-{digest}").write_bytes(content)
            listed.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})
        manifest = folder / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": listed}))
    return folder


def test_a_store(tmp_path: Path) -> None:
    params = json.dumps({"num_ctx": 32768, "top_p": 0.9, "num_predict": -1}).encode()
    made = import_ollama(
        store(
            tmp_path / "models",
            {
                "registry.ollama.ai/library/llama3.2/latest": {"model": b"GGUF1", "params": params, "template": b"{{ }}"},
                "registry.ollama.ai/library/llama3.2/1b": {"model": b"GGUF2", "projector": b"GGUF3"},
                "hf.co/bartowski/Qwen/Q4_K_M": {"model": b"GGUF4", "system": b"be nice"},
                "registry.ollama.ai/library/cloudy/120b-cloud": {"params": b"{}"},
            },
        )
    )
    models = desired(made).models
    assert set(models) == {"llama3.2", "llama3.2-1b", "qwen-q4_k_m"}
    first = models[ModelName("llama3.2")]
    assert Path(first.source).read_bytes() == b"GGUF1"
    assert (first.context, first.aliases, first.request.default) == (32768, ("llama3.2:latest",), {"top_p": 0.9})
    assert models[ModelName("llama3.2-1b")].aliases == ("llama3.2:1b",)
    assert "hf.co/bartowski/Qwen:Q4_K_M" in models[ModelName("qwen-q4_k_m")].aliases
    assert sorted(left.key for left in made.left) == [
        "cloudy:120b-cloud",
        "hf.co/bartowski/Qwen:Q4_K_M: system",
        "llama3.2: template",
    ]


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: 1\na: 2\n", "a: [", "\x00"])
def test_what_cannot_be_read_is_said_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(OffloaddError):
        import_llama_swap(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("llama-server -m a.gguf -c 4096 -np 2", {"source": "a.gguf", "context": 2048, "parallel": 2}),
        ("llama-server -m a.gguf --ctx-size=4096 --parallel=1 -ngl 0", {"context": 4096, "devices": "cpu"}),
        ("llama-server -m a.gguf -ngl 20", {"gpu_layers": 20}),
        ("llama-server -m a.gguf -ngl -1", {"gpu_layers": "all"}),
        ("llama-server -m a.gguf -dev none", {"devices": "cpu"}),
        ("llama-server -m a.gguf --n_gpu_layers all", {"gpu_layers": "all"}),
        ("python3 -m vllm.entrypoints.openai.api_server --model a/b --max-model-len 10", {"source": "a/b", "context": 10}),
        ("text-generation-launcher --model-id a/b --max-total-tokens 20", {"source": "a/b", "context": 20}),
    ],
)
def test_command_lines(command: str, expected: dict[str, Any]) -> None:
    assert parse(command).settings.items() >= expected.items()


def test_arguments_that_are_the_daemons_are_left_out_and_told() -> None:
    parsed = parse("llama-server -m a.gguf -c 1 -np 1 --api-key x --slot-save-path /tmp --top-k 3 --host 0.0.0.0 --port 80")
    assert parsed.settings["args"] == ["--top-k", "3"]
    assert [flag for flag, _ in parsed.left] == ["--api-key", "--slot-save-path"]


def test_the_command(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "new.yaml"
    said = runner.invoke(app, ["import", "llama-swap", str(SAMPLES / "llama-swap.yaml"), "-o", str(out)])
    assert said.exit_code == 0, said.output
    assert re.search(r"llama-swap.yaml:5: logLevel: ", said.stderr)
    assert yaml.safe_load(out.read_text())["models"]
    again = runner.invoke(app, ["import", "llama-swap", str(SAMPLES / "llama-swap.yaml"), "-o", str(out)])
    assert isinstance(again.exception, OffloaddError)
    assert runner.invoke(app, ["check", str(out)]).exit_code == 0
