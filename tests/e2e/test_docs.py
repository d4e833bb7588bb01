"""What the README and the docs say is what happens: their configs, their commands with the output, and their Python, in order.

The README is run with the real server and model, the pages below `docs/` with the stand-in. A block that cannot be run says why:
```console not-run: the reason. Blocks of `text` are output, or an example of something else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from offloadd.backends import discover
from offloadd.config import SourceText, load
from offloadd.demo import find_model, find_server
from offloadd.errors import PermanentError
from tests.conformance.servers import STANDIN, tiny_gguf

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = {"adding-an-engine": "tests/integration/test_adding_an_engine.py"}
"""Pages that a test of their own follows."""
MADE = {"docs/faults.md": "make faults"}
"""Pages that a command of its own writes; a copy may be without them."""
BLOCK = re.compile(r"^```(?P<kind>\w*)[ ]*(?P<name>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not-run:"
RUN = ("yaml", "json", "python", "console")
DONE_BY_CI = ("make demo", "make test")
DEADLINE_S = 60


@dataclass(frozen=True)
class Place:
    """Where the README's commands are run: its paths and its port are replaced by those of the test."""

    folder: Path
    port: int
    models: Path
    server: list[str]
    server_env: dict[str, str]

    def local(self, text: str) -> str:
        return text.replace("/var/lib/ml-models", str(self.models)).replace(":9000", f":{self.port}")

    def config(self, text: str) -> str:
        text = self.local(text).replace("storage: {", f"storage: {{data_dir: {self.folder}/data, ")
        engine = f"backends: {{llamacpp: {{command: {json.dumps(self.server)}, env: {json.dumps(self.server_env)}}}}}\n"
        return f'{text}server: {{listen: ["127.0.0.1:{self.port}"]}}\n{engine}'

    @property
    def env(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OFFLOADD_SERVER": f"http://127.0.0.1:{self.port}"}


class AnySecrets:
    """Every variable and every file that an example names is there."""

    def env(self, name: str) -> str | None:
        return f"the value of the variable {name}"

    def file(self, path: str) -> str:
        return f"the text of the file {path}"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def blocks(page: Path) -> list[re.Match[str]]:
    """Those of a page that are to be run."""
    found = BLOCK.finditer(page.read_text())
    return [block for block in found if block["kind"] in RUN and not block["name"].startswith(NOT_RUN)]


def test_readme_does_what_it_says(tmp_path: Path, port: int) -> None:
    try:
        (server, env), model = find_server(), find_model()
    except PermanentError as error:
        pytest.skip(f"the README needs a real server and model: {error.message}")
    run_page(README, Place(tmp_path, port, model.parent, [str(server)], env))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ELSEWHERE and blocks(page)], ids=lambda page: page.stem
)
def test_docs_do_what_they_say(page: Path, tmp_path: Path, port: int) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in re.findall(r"source: (\w[\w.-]*\.gguf)", page.read_text()):
        (models / name).write_bytes(tiny_gguf())
    run_page(page, Place(tmp_path, port, models, [sys.executable, str(STANDIN)], {}))


def test_pages_that_are_followed_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / test).read_text()


def run_page(page: Path, place: Place) -> None:
    background: list[subprocess.Popen[bytes]] = []
    try:
        for block in blocks(page):
            follow(block, place, background)
    finally:
        for process in background:
            process.terminate()
        ends = [process.wait(DEADLINE_S) for process in background]
    assert set(ends) <= {0}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in BLOCK.finditer(page.read_text()):
        assert block["kind"] in ("", "text", *RUN) or block["name"].startswith(NOT_RUN), (
            f"{page.name}: a block of {block['kind']!r}"
        )
        if block["name"].startswith(NOT_RUN):
            assert len(block["name"].removeprefix(NOT_RUN).split()) >= 3, f"{page.name}: {block['name']!r} gives no reason"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        path = page.parent / target
        is_made = str(path.relative_to(ROOT)) in MADE
        assert target.startswith("https://") or is_made or path.exists(), f"{page.name}: {target}"


def test_pages_that_are_written_from_the_code_are_current() -> None:
    """`make docs` writes them. So every key, command, option and path is documented."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        assert text == (ROOT / "docs" / name).read_text(), f"docs/{name} is not current: run make docs"
        described = 3 if name == "config.md" else 2 if name == "api.md" else 1
        for line in text.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert not cells or cells[described], f"docs/{name}: {line} has no description"


def follow(block: re.Match[str], place: Place, background: list[subprocess.Popen[bytes]]) -> None:
    match block["kind"]:
        case "yaml" if block["name"]:
            (place.folder / block["name"]).write_text(place.config(block["text"]))
        case "yaml" | "json":
            loaded = load([SourceText("block", block["text"])], backends=discover(), secrets=AnySecrets())
            assert loaded.ok, loaded.render()
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
