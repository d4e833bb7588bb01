"""Hub ids: what a download has left of a model is read, and what has not been downloaded is left to its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.observe.sources import Sources, hub_folders
from offloadd.state.shape import ModelShape


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache as the hub's client leaves it: a snapshot of links to blobs, named by a ref."""
    kept = tmp_path / "hub" / "models--org--name"
    (kept / "blobs").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "blobs" / "1").write_bytes(b"x" * 100)
    (kept / "snapshots" / "abc" / "model.safetensors").symlink_to(kept / "blobs" / "1")
    (kept / "refs" / "main").write_text("abc\n")
    return tmp_path / "hub"


def read(source: str, *hubs: Path, models_path: Path | None = None) -> object:
    seen: list[Path] = []

    def shape(path: Path) -> ModelShape:
        seen.append(path)
        return ModelShape(architecture="llama")

    folders = [str(models_path)] if models_path else []
    facts = Sources(shape, lambda _path: "").read([source], folders, [str(hub) for hub in hubs])[source]
    return facts, seen


def test_a_downloaded_model_is_read_where_it_lies_and_given_by_its_id(hub: Path) -> None:
    facts, seen = read("org/name", hub)
    assert (facts.path, facts.size, facts.problem) == ("org/name", 100, "")
    assert facts.shape is not None
    assert seen == [hub / "models--org--name" / "snapshots" / "abc"]


def test_one_that_is_not_there_is_no_problem_of_ours(tmp_path: Path) -> None:
    facts, seen = read("org/other", tmp_path)
    assert (facts.path, facts.size, facts.problem, seen) == ("org/other", 0, "", [])


def test_a_folder_under_models_path_wins_over_a_hub_id(hub: Path, tmp_path: Path) -> None:
    own = tmp_path / "models" / "org" / "name"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"y" * 7)
    facts, _ = read("org/name", hub, models_path=tmp_path / "models")
    assert (facts.path, facts.size) == (str(own), 7)


def test_what_is_no_hub_id_is_missing(tmp_path: Path) -> None:
    facts, _ = read("just-a-name.gguf", tmp_path)
    assert "does not exist" in facts.problem


def test_engines_say_where_they_keep_their_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    found = hub_folders([{"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b"}, {}])
    assert found == ("/a/hub", "/b", "/c/huggingface/hub")
