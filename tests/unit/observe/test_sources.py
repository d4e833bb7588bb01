"""What a source means on disk, and how often its header is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from offloadd.errors import PermanentError
from offloadd.observe.sources import Sources, read_facts
from offloadd.state.shape import ModelShape


class Reader:
    """Reads shapes, and counts."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.fails = False

    def __call__(self, path: Path) -> ModelShape:
        self.read.append(path.name)
        if self.fails:
            raise PermanentError("no such magic")
        return ModelShape(architecture="llama", name=path.name)


def put(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (folder / name).write_bytes(b"x" * size)


def test_a_file_is_found_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    put(tmp_path / "two", "a.gguf")
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    facts = read_facts("a.gguf", folders)
    assert (facts.path, facts.size, facts.problem) == (str(tmp_path / "two" / "a.gguf"), 10, "")
    put(tmp_path / "one", "a.gguf", size=20)
    assert read_facts("a.gguf", folders).size == 20
    assert read_facts(str(tmp_path / "two" / "a.gguf"), ["/elsewhere"]).size == 10


def test_the_identity_follows_the_content(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf")
    before = read_facts("a.gguf", [str(tmp_path)]).identity
    assert read_facts("a.gguf", [str(tmp_path)]).identity == before
    os.utime(tmp_path / "a.gguf", ns=(1, 1))
    after = read_facts("a.gguf", [str(tmp_path)]).identity
    assert after != before
    put(tmp_path, "fresh")
    (tmp_path / "fresh").rename(tmp_path / "a.gguf")
    assert read_facts("a.gguf", [str(tmp_path)]).identity not in (before, after)


def test_all_parts_of_a_split_model_count_whichever_is_named(tmp_path: Path) -> None:
    names = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    put(tmp_path, *names)
    found = [read_facts(name, [str(tmp_path)]) for name in names]
    assert {(facts.path, facts.size) for facts in found} == {(str(tmp_path / names[0]), 30)}
    (tmp_path / names[1]).unlink()
    facts = read_facts(names[2], [str(tmp_path)])
    assert facts.problem == "m-00002-of-00003.gguf is missing from the split model"
    assert facts.size is None


def test_a_folder_is_the_sum_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "model" / "more").mkdir(parents=True)
    put(tmp_path / "model", "config.json", "a.safetensors")
    facts = read_facts("model", [str(tmp_path)])
    assert (facts.path, facts.size) == (str(tmp_path / "model"), 20)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "model file it does not exist (looked for "),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("/nowhere"), "does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_told(tmp_path: Path, make: object, said: str) -> None:
    make(tmp_path / "it")  # type: ignore[operator]
    facts = read_facts("it", [str(tmp_path)])
    assert said in facts.problem
    assert facts.size is None


def test_a_header_is_read_again_only_when_the_file_is_another(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf", "b.gguf")
    reader = Reader()
    sources = Sources(reader, lambda path: f"content of {path.name}")
    for _ in range(3):
        found = sources.read(["a.gguf", "b.gguf", "missing.gguf"], [str(tmp_path)])
    assert reader.read == ["a.gguf", "b.gguf"]
    assert found["a.gguf"].shape == ModelShape(architecture="llama", name="a.gguf")
    assert found["a.gguf"].content == "content of a.gguf"
    assert (found["missing.gguf"].shape, found["missing.gguf"].content) == (None, "")
    os.utime(tmp_path / "a.gguf", ns=(1, 1))
    sources.read(["a.gguf"], [str(tmp_path)])
    sources.read(["a.gguf", "b.gguf"], [str(tmp_path)])  # nobody named b in between, so it was forgotten
    assert reader.read == ["a.gguf", "b.gguf", "a.gguf", "b.gguf"]


def test_a_header_that_cannot_be_read_is_left_to_the_engine(tmp_path: Path) -> None:
    put(tmp_path, "a.gguf")
    reader = Reader()
    reader.fails = True
    sources = Sources(reader, lambda path: f"content of {path.name}")
    for _ in range(2):
        facts = sources.read(["a.gguf"], [str(tmp_path)])["a.gguf"]
        assert (facts.problem, facts.size, facts.shape) == ("", 10, None)
    assert reader.read == ["a.gguf"]
