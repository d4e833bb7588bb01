"""What engines say of themselves, however they say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.backends import discover
from offloadd.observe.engines import EngineFinder
from offloadd.state.desired import BackendKind, Engine
from offloadd.state.ids import BackendName, DeviceKind

HESITANT = """#!/bin/sh
echo "ggml: looking for devices" >&2
sleep 0.2
case "$1" in
--version) echo "version: 7 (build 1)" ;;
--list-devices) echo "Available devices:"; sleep 0.1; echo "  CUDA0: NVIDIA A (1 MiB free)" ;;
esac
echo >> "$COUNT"
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(HESITANT)
    path.chmod(0o755)
    return path


def engine(path: Path | str, count: Path) -> Engine:
    return Engine(name=BackendName("llamacpp"), adapter="llamacpp", command=(str(path),), env={"COUNT": str(count)})


async def test_a_program_is_heard_to_its_end_and_asked_once(program: Path, tmp_path: Path) -> None:
    finder = EngineFinder(discover())
    for _ in range(2):
        view = await finder.look(engine(program, tmp_path / "count"))
        assert (view.version, view.gpus, view.problem) == ("7 (build 1)", frozenset({DeviceKind.NVIDIA}), "")
    assert (tmp_path / "count").read_text().count("\n") == 2  # the version, and the devices


async def test_a_program_that_takes_its_place_is_asked_again(program: Path, tmp_path: Path) -> None:
    finder = EngineFinder(discover())
    await finder.look(engine(program, tmp_path / "count"))
    newer = tmp_path / "newer"
    newer.write_text(HESITANT.replace("version: 7", "version: 8"))
    newer.chmod(0o755)
    newer.rename(program)
    assert (await finder.look(engine(program, tmp_path / "count"))).version == "8 (build 1)"


async def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    view = await EngineFinder(discover()).look(engine("no-such-llama-server", tmp_path))
    assert view.problem == "no-such-llama-server is not on PATH"
    assert "backends.llamacpp.command" in view.hint


async def test_an_engine_without_an_adapter_is_said_to_come_later() -> None:
    view = await EngineFinder(discover()).look(Engine(name=BackendName("mlx"), adapter="mlx", command=("mlx",)))
    assert view.problem == "this version of offloadd cannot run mlx yet"


async def test_an_external_engine_is_there_without_a_program() -> None:
    cloud = Engine(name=BackendName("cloud"), adapter="external", kind=BackendKind.EXTERNAL, url="http://h")
    view = await EngineFinder(discover()).look(cloud)
    assert (view.problem, view.gpus) == ("", frozenset())


async def test_a_program_that_has_no_quick_answer_about_itself_is_not_asked(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    program.chmod(0o755)
    view = await EngineFinder(discover()).look(Engine(name=BackendName("vllm"), adapter="vllm", command=(str(program), "serve")))
    assert (view.problem, view.path) == ("", str(program))
    assert not (tmp_path / "asked").exists()
