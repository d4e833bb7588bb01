"""docs/adding-an-engine.md, followed to the letter: its one file, its one entry, and a server that speaks as SGLang does."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import offloadd
from tests.conformance.processes import STANDINS
from tests.integration.daemon import Daemon, running
from tests.integration.gpu import environ

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-an-engine.md").read_text()


def block(language: str) -> str:
    """The one block of the page in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of offloadd with the page's file, and nothing else changed."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(Path(offloadd.__file__).parent, folder / "offloadd", ignore=shutil.ignore_patterns("__pycache__"))
    text = block("python")
    (name,) = re.findall(r"\A# (offloadd/backends/\w+\.py)\n", text)
    assert not (folder / name).exists()
    (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def entry() -> dict[str, Any]:
    """The page's config, with the stand-in in place of the program and of the gigabytes."""
    found: dict[str, Any] = yaml.safe_load(block("yaml"))
    found["backends"]["sglang"]["command"] = [sys.executable, str(STANDINS / "sglang_server.py")]
    found["models"]["qwen"] |= {"vram": "64MiB", "env": {"STANDIN_TOKEN_S": "0.005"}}
    return found


@pytest.fixture(scope="module")
def daemon(package: Path, entry: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("sglang")
    with running(
        folder, entry["models"], backends=entry["backends"], env={"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    ) as found:
        yield found


def test_it_is_served(daemon: Daemon, package: Path) -> None:
    assert environ(daemon.process.pid)["PYTHONPATH"] == str(package)
    reply = daemon.chat("qwen")
    assert reply.status == 200, reply.body
    assert reply.headers["X-Offloadd-Backend"] == "sglang"
    assert reply.json()["choices"][0]["message"]["content"] == "the night was calm"
    assert daemon.events("qwen", tokens=3)[-1] == "[DONE]"


def test_its_options_reach_the_command_line(daemon: Daemon) -> None:
    daemon.chat("qwen")
    (pid,) = daemon.pids("qwen")
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    assert words[words.index("--kv-cache-dtype") + 1] == "fp8_e5m2"
    assert words[words.index("--served-model-name") + 1] == "qwen"


def test_it_is_listed_among_the_engines(daemon: Daemon) -> None:
    (found,) = (each for each in daemon.get("/backends")["backends"] if each["name"] == "sglang")
    assert found["preference"] == 4


def test_mistakes_in_its_options_are_found_where_they_stand(package: Path, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(block("yaml").replace("kv_cache_dtype: fp8_e5m2", "kv_cache_dtyp: fp8"))
    env = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "offloadd", "check", str(config)], capture_output=True, text=True, env=env, check=False
    )
    assert ended.returncode == 1
    assert 'bad.yaml:8:14: error: unknown key "kv_cache_dtyp" in models.qwen.sglang (did you mean "kv_cache_dtype"?)' in (
        ended.stdout + ended.stderr
    )


def test_the_page_is_no_longer_than_it_says() -> None:
    tree = ast.parse(block("python"))
    assert any(isinstance(node, ast.Assign) and node.targets[0].id == "BACKEND" for node in tree.body)  # type: ignore[attr-defined]
    assert block("python").count("\n") < 160
