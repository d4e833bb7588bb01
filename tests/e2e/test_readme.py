"""What the README says is what happens: its config, its commands with their output, and its Python, in its order."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from offloadd.demo import find_model, find_server
from offloadd.errors import PermanentError

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(?P<kind>\w+)[ ]*(?P<name>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
DONE_BY_CI = ("make demo", "make test")
DEADLINE_S = 60


@dataclass(frozen=True)
class Place:
    """Where the README's commands are run: its paths and its port are replaced by those of the test."""

    folder: Path
    port: int
    models: Path
    server: Path
    server_env: dict[str, str]

    def local(self, text: str) -> str:
        return text.replace("/var/lib/ml-models", str(self.models)).replace(":9000", f":{self.port}")

    def config(self, text: str) -> str:
        text = self.local(text).replace("storage: {", f"storage: {{data_dir: {self.folder}/data, ")
        engine = f"backends: {{llamacpp: {{command: [{self.server}], env: {json.dumps(self.server_env)}}}}}\n"
        return f'{text}server: {{listen: ["127.0.0.1:{self.port}"]}}\n{engine}'

    @property
    def env(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OFFLOADD_SERVER": f"http://127.0.0.1:{self.port}"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    try:
        (server, env), model = find_server(), find_model()
    except PermanentError as error:
        pytest.skip(f"the README needs a real server and model: {error.message}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Place(tmp_path, port, model.parent, server, env)


def test_readme_does_what_it_says(place: Place):
    background: list[subprocess.Popen[bytes]] = []
    try:
        for block in BLOCK.finditer(README.read_text()):
            follow(block, place, background)
    finally:
        for process in background:
            process.terminate()
        ends = [process.wait(DEADLINE_S) for process in background]
    assert ends == [0]


def follow(block: re.Match[str], place: Place, background: list[subprocess.Popen[bytes]]) -> None:
    match block["kind"]:
        case "yaml":
            (place.folder / block["name"]).write_text(place.config(block["text"]))
        case "python":
            script = place.local(block["text"])
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
            assert result.stdout.strip(), "the model said nothing"
        case "console":
            for command, expected in steps(block["text"]):
                run(place.local(command), place.local(expected), place, background)


def steps(text: str) -> list[tuple[str, str]]:
    """Commands with the output that is shown below each."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(command.partition("#")[0].strip(), expected) for command, _, expected in (part.partition("\n") for part in parts)]


def run(command: str, expected: str, place: Place, background: list[subprocess.Popen[bytes]]) -> None:
    if command in DONE_BY_CI:
        return
    if command.endswith("&"):
        with (place.folder / "log").open("wb") as log:
            background.append(
                subprocess.Popen(command.rstrip("& ").split(), cwd=place.folder, env=place.env, stderr=log, stdout=log)
            )
        return
    result = subprocess.run(
        command, shell=True, cwd=place.folder, env=place.env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    said = result.stdout + result.stderr
    assert (result.returncode == 0) != ("refused" in expected), f"{command}: {said}"
    pattern = re.escape("\n".join(line.rstrip() for line in expected.strip().splitlines())).replace("…", ".*")
    shown = "\n".join(line.rstrip() for line in said.strip().splitlines())
    assert re.fullmatch(pattern, shown, re.DOTALL), f"{command} said:\n{shown}"


def test_every_command_and_option_is_documented():
    """What `--help` lists is in the README or says enough by itself: no command without a line of help."""
    for program in ("offloadd", "offloadctl"):
        path = shutil.which(program, path=str(Path(sys.executable).parent))
        assert path, f"{program} is not installed beside {sys.executable}"
        shown = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        for command in re.findall(r"^│ (\w+) +(.*?)│$", shown, re.MULTILINE):
            assert command[1].strip(), f"{program} {command[0]} has no help"
