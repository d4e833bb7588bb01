"""The quick look at a disk on which nothing has changed: it is taken, and whatever changes is seen all the same."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offloadd.registry.discovery import tree
from offloadd.registry.discovery.scan import Scanner
from offloadd.registry.discovery.stores import Store
from offloadd.registry.readers import read_model
from tests.unit.registry.test_discovery import OLD_NS, gguf

Change = Callable[[Path], object]


def settled(path: Path) -> None:
    """As if all of it had been there for long: a folder's own date is set last."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            os.utime(Path(folder, name), ns=(OLD_NS, OLD_NS), follow_symlinks=False)
        os.utime(folder, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    gguf(tmp_path / "store" / "one.gguf")
    gguf(tmp_path / "store" / "deep" / "er" / "two.gguf")
    gguf(tmp_path / "elsewhere" / "three.gguf")
    gguf(tmp_path / "other" / "four.gguf")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "way")
    (tmp_path / "way").symlink_to(tmp_path / "elsewhere")
    settled(tmp_path)
    now_ns = time.time_ns
    # Dates of change cannot be set back, so the clock is ahead.
    monkeypatch.setattr(tree.time, "time_ns", lambda: now_ns() + 10_000_000_000)
    return tmp_path


def retarget(disk: Path) -> None:
    """A link that a link in the store leads to: nothing in the store itself changes."""
    (disk / "way").unlink()
    (disk / "way").symlink_to(disk / "other")


def grow(disk: Path) -> None:
    with (disk / "store" / "deep" / "er" / "two.gguf").open("ab") as file:
        file.write(b"more")


def exchange(disk: Path) -> None:
    """Another file of the same size and date."""
    path = disk / "store" / "one.gguf"
    beside = gguf(disk / "store" / "deep" / "beside", general__name="twins")
    path.write_bytes(beside.read_bytes())
    beside.replace(path)
    os.utime(path, ns=(OLD_NS, OLD_NS))


CHANGES: dict[str, Change] = {
    "a new file": lambda disk: gguf(disk / "store" / "deep" / "new.gguf"),
    "a new folder": lambda disk: gguf(disk / "store" / "deep" / "new" / "new.gguf"),
    "a file that grows": grow,
    "a file that is exchanged": exchange,
    "a file that goes": lambda disk: (disk / "store" / "deep" / "er" / "two.gguf").unlink(),
    "a folder that goes": lambda disk: shutil.rmtree(disk / "store" / "deep"),
    "a renamed file": lambda disk: (disk / "store" / "one.gguf").rename(disk / "store" / "1.gguf"),
    "a renamed folder": lambda disk: (disk / "store" / "deep").rename(disk / "store" / "deeper"),
    "a link that leads elsewhere": retarget,
    "a store that comes": lambda disk: gguf(disk / "late" / "late.gguf"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_new_takes_no_walk_and_every_change_is_seen(disk: Path, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [Store("models_path", str(disk / "store")), Store("folder", str(disk / "late"))]
    scanner = Scanner(read_model)
    first = scanner.scan(stores)
    assert {found.name for found in first.found.values()} == {"one", "two", "three"}
    assert scanner.scan(stores) is first  # by a walk: the first look has read folders and files, which has set dates of theirs
    with monkeypatch.context() as patch:
        patch.setattr(tree, "_Walk", None)
        assert scanner.scan(list(stores)) is first
    change(disk)
    after = scanner.scan(stores)
    assert after is not first
    assert after.found == Scanner(read_model).scan(stores).found


def test_other_stores_are_walked(disk: Path) -> None:
    scanner = Scanner(read_model)
    scanner.scan([Store("models_path", str(disk / "store"))])
    found = scanner.scan([Store("models_path", str(disk / "store")), Store("folder", str(disk / "other"))]).found
    assert {each.name for each in found.values()} == {"one", "two", "three", "four"}


def test_a_link_whose_file_comes_later_is_a_model_then(disk: Path) -> None:
    (disk / "store" / "away.gguf").symlink_to(disk / "other" / "away.gguf")
    settled(disk / "store")
    stores = [Store("models_path", str(disk / "store"))]
    scanner = Scanner(read_model)
    problems = {found.name: found.facts.problem for found in scanner.scan(stores).found.values()}
    assert "is a link to a file that is not there" in problems["away"]
    gguf(disk / "other" / "away.gguf")  # which leaves the store's own folders as they were
    assert {found.name: found.facts.problem for found in scanner.scan(stores).found.values()}["away"] == ""
