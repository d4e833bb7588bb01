"""The registry's file: what it keeps, and what it survives."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from offloadd.errors import PermanentError
from offloadd.registry import store
from offloadd.registry.migrations import STEPS
from offloadd.registry.store import Registry
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Footprint
from offloadd.units import Bytes, Seconds


def footprint(peak: int, load: float | None = 1.5) -> Footprint:
    seconds = None if load is None else Seconds(load)
    return Footprint(model=ModelName("a"), backend=BackendName("llamacpp"), peak=Bytes(peak), load_seconds=seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with closing(Registry(path)) as opened:
        yield opened


def rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT key, peak_bytes, samples, seen_at FROM footprint ORDER BY key").fetchall()


def test_what_was_learned_is_there_after_a_restart(registry: Registry, path: Path) -> None:
    assert registry.footprints() == {}
    registry.learn({"one": footprint(100), "two": footprint(200, None)}, 1000.0)
    registry.close()
    with closing(Registry(path)) as again:
        assert again.footprints() == {"one": footprint(100), "two": footprint(200, None)}
        assert again.problem == ""


def test_the_higher_peak_is_kept(registry: Registry, path: Path) -> None:
    for seen_at, peak in enumerate((100, 300, 200)):
        registry.learn({"one": footprint(peak)}, seen_at)
    assert registry.footprints()["one"].peak == 300
    assert rows(path) == [("one", 300, 3, 2.0)]


def test_sizes_of_terabytes_are_kept(registry: Registry) -> None:
    registry.learn({"one": footprint(2**45)}, 1.0)
    assert registry.footprints()["one"].peak == 2**45


def test_those_not_seen_for_longest_are_forgotten(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_FOOTPRINTS", 3)
    for number in range(5):
        registry.learn({f"key-{number}": footprint(number + 1)}, float(number))
    registry.learn({"key-2": footprint(1)}, 9.0)
    registry.learn({"key-5": footprint(6)}, 10.0)
    assert set(registry.footprints()) == {"key-2", "key-4", "key-5"}


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_set_aside_with_all_its_parts(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    path.with_name("registry.db-wal").write_bytes(b"rest")
    with closing(Registry(path)) as registry:
        assert registry.problem.startswith("the registry was damaged; the old file is ")
        (old,) = (found for found in path.parent.glob("registry.db.damaged-*") if not found.name.endswith(("-wal", "-shm")))
        assert old.read_bytes() == damage
        assert str(old) in registry.problem
        registry.learn({"one": footprint(1)}, 1.0)
        assert set(registry.footprints()) == {"one"}
        assert registry.problem == ""


def test_a_damaged_page_is_found_at_the_start(path: Path) -> None:
    with closing(Registry(path)) as registry:
        registry.learn({f"key-{number}": footprint(number + 1) for number in range(500)}, 1.0)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    data[3 * 4096 : 4 * 4096] = b"\x55" * 4096
    path.write_bytes(data)
    with closing(Registry(path)) as registry:
        assert "was damaged" in registry.problem
        assert registry.footprints() == {}


def test_a_newer_schema_is_refused_and_left_alone(registry: Registry, path: Path) -> None:
    registry.learn({"one": footprint(1)}, 1.0)
    registry.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    with pytest.raises(PermanentError, match=f"schema {len(STEPS) + 1}") as refused:
        Registry(path)
    assert "newer offloadd" in refused.value.hint
    assert [found.name for found in path.parent.iterdir() if "damaged" in found.name] == []
    assert rows(path) == [("one", 1, 1, 1.0)]


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A disk that is full: no file grows beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_problem_until_there_is_room(registry: Registry) -> None:
    registry.learn({"one": footprint(1)}, 1.0)
    many = {f"key-{number}": footprint(number + 1) for number in range(2000)}
    with files_at_most(64 * 1024):
        registry.learn(many, 2.0)
        assert registry.problem.startswith("the registry cannot be written: ")
        assert set(registry.footprints()) == {"one"}
    registry.learn(many, 3.0)
    assert registry.problem == ""
    assert len(registry.footprints()) == 2001


def test_a_file_that_somebody_else_holds_is_a_problem_and_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store._PRAGMAS, "busy_timeout", 50)
    with closing(Registry(path)) as registry, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        registry.learn({"one": footprint(1)}, 1.0)
        assert registry.problem == "the registry cannot be written: database is locked"
        other.execute("ROLLBACK")
        registry.learn({"one": footprint(1)}, 2.0)
        assert registry.problem == ""
        assert set(registry.footprints()) == {"one"}


def test_a_healthy_file_that_cannot_be_used_now_is_left_alone(
    registry: Registry, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.learn({"one": footprint(1)}, 1.0)
    registry.close()
    monkeypatch.setitem(store._PRAGMAS, "busy_timeout", 50)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE footprint SET samples = 1")
        with closing(Registry(path)) as second:
            assert "cannot be used" in second.problem
            second.learn({"two": footprint(2)}, 2.0)
            assert set(second.footprints()) == {"two"}
            assert "cannot be used" in second.problem
        other.execute("ROLLBACK")
    assert [found.name for found in path.parent.iterdir() if "damaged" in found.name] == []
    with closing(Registry(path)) as again:
        assert set(again.footprints()) == {"one"}


def test_a_disk_that_is_full_at_the_start_keeps_nobody_from_starting(path: Path) -> None:
    with files_at_most(1024), closing(Registry(path)) as registry:
        assert "cannot be used" in registry.problem
        registry.learn({"one": footprint(1)}, 1.0)
        assert set(registry.footprints()) == {"one"}
