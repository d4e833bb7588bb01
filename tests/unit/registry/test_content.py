"""The cheap fingerprint of a model's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from offloadd.registry.content import HEAD, SAMPLE, content_of_model


def write(path: Path, size: int = 10**6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(index % 251 for index in range(1000)) * (size // 1000))
    return path


def test_a_copy_and_a_renamed_file_have_the_same(tmp_path: Path) -> None:
    first = write(tmp_path / "a.gguf")
    content = content_of_model(first)
    shutil.copy(first, tmp_path / "copy.gguf")
    first.rename(tmp_path / "b.gguf")
    os.utime(tmp_path / "b.gguf", ns=(1, 1))
    assert content == content_of_model(tmp_path / "b.gguf") == content_of_model(tmp_path / "copy.gguf")


@pytest.mark.parametrize("at", [0, HEAD - 1, HEAD, HEAD + SAMPLE - 1, 10**6 - 1, 10**6 - SAMPLE])
def test_other_bytes_where_it_looks_are_seen(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "a.gguf")
    before = content_of_model(path)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    assert content_of_model(path) != before


@pytest.mark.parametrize("size", [0, 1, 1000, HEAD, HEAD + 1, HEAD + SAMPLE, HEAD + 2 * SAMPLE])
def test_any_size_is_read_and_counts(tmp_path: Path, size: int) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(size))
    other.write_bytes(bytes(size + 1))
    assert content_of_model(one) != content_of_model(other)


def test_all_parts_count_whichever_is_named(tmp_path: Path) -> None:
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    paths = [write(tmp_path / name, 2000 * (index + 1)) for index, name in enumerate(names)]
    assert content_of_model(paths[0]) == content_of_model(paths[1])
    before = content_of_model(paths[0])
    write(paths[1], 9000)
    assert content_of_model(paths[0]) != before
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        content_of_model(paths[0])


def test_a_folder_is_its_weights_and_its_config(tmp_path: Path) -> None:
    write(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    before = content_of_model(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("hello")
    assert content_of_model(tmp_path / "m") == before
    (tmp_path / "m" / "config.json").write_text('{"a": 1}')
    assert content_of_model(tmp_path / "m") != before
