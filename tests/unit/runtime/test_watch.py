"""The config's watcher: which folders it watches, and that it outlives whatever happens to them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import watchfiles

from offloadd.backends import discover
from offloadd.clock import SystemClock
from offloadd.runtime import reload
from offloadd.runtime.eye import watched_folders
from offloadd.runtime.reload import ConfigStore


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "offloadd.yaml"
    path.parent.mkdir()
    assert watched_folders(path) == {path.parent}
    path.write_text("{}")
    assert watched_folders(path) == {path.parent}


def test_a_folder_of_files(tmp_path: Path) -> None:
    assert tmp_path in watched_folders(tmp_path)


def test_every_step_of_a_chain_of_links(tmp_path: Path) -> None:
    """As Kubernetes lays it out: the file links through `..data`, which links to the folder in force."""
    mount, version = tmp_path / "mount", tmp_path / "mount" / "..2026"
    version.mkdir(parents=True)
    (version / "offloadd.yaml").write_text("{}")
    (mount / "..data").symlink_to("..2026")
    (mount / "offloadd.yaml").symlink_to("..data/offloadd.yaml")
    (tmp_path / "link").symlink_to(mount)
    found = watched_folders(tmp_path / "link" / "offloadd.yaml")
    assert {tmp_path, mount, version} <= {folder.resolve() for folder in found}


def test_links_that_lead_nowhere_or_round(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "x")
    assert watched_folders(tmp_path / "nowhere") == {tmp_path}
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert watched_folders(tmp_path / "round") == {tmp_path}


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), OSError("no watch left"), RuntimeError("in the watcher")])
async def test_without_a_watch_it_looks_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object, **__: object) -> object:
        raise error

    monkeypatch.setattr(watchfiles, "watch", broken)
    monkeypatch.setattr(reload, "POLL", 0.01)
    monkeypatch.setattr(reload, "SETTLE", 0.001)
    path = tmp_path / "offloadd.yaml"
    path.write_text("{}")
    store = ConfigStore(path, backends=discover(), clock=SystemClock())
    await store.start()
    watching = asyncio.create_task(store.watch())
    path.write_text("models: {a: {source: /x.gguf}}")
    async with asyncio.timeout(5):
        while not store.applied.desired.models:
            await asyncio.sleep(0.005)
    path.write_text("{")
    async with asyncio.timeout(5):
        while store.attempt.applied:
            await asyncio.sleep(0.005)
    assert store.applied.desired.models
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
