"""What the registry survives: damage, full and read-only disks, locks, a server that goes away."""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from offloadd.registry import database
from offloadd.registry.batch import Batch
from offloadd.registry.database import Place
from offloadd.registry.store import REOPEN_S, Registry
from tests import postgres
from tests.unit.registry.test_store import footprint, load

WRITER = """
import sys
from offloadd.registry.database import Place
from offloadd.registry.store import Registry
from tests.unit.registry.test_store import footprint
place = Place(url=sys.argv[1]) if "://" in sys.argv[1] else Place(file=__import__("pathlib").Path(sys.argv[1]))
registry = Registry(place)
for number in range(10**6):
    assert registry.learn({f"{sys.argv[2]}-{number}": footprint(number + 1)}, float(number))
    print(number, flush=True)
"""
SMALL_DISK = """
import shutil, subprocess, sys, time
from pathlib import Path
from offloadd.registry import store
from offloadd.registry.store import Registry
from tests.unit.registry.test_store import footprint
store.REOPEN_S = 0.0
disk = Path(sys.argv[1])
mount = lambda *options: subprocess.run(["mount", *options, str(disk)], check=True)
mount("-t", "tmpfs", "-o", "size=400k", "none")
registry = Registry(disk / "registry.db")
assert registry.learn({"before": footprint(1)}, 1.0), registry.problem
ballast = disk / "ballast"
with open(ballast, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
many = {f"key-{number}": footprint(number + 1) for number in range(500)}
assert not registry.learn(many, 2.0)
assert "full" in registry.problem, registry.problem
assert set(registry.footprints()) == {"before"}
ballast.unlink()
assert registry.learn(many, 3.0), registry.problem
assert registry.problem == "" and len(registry.footprints()) == 501
registry.close()
mount("-o", "remount,ro")
registry = Registry(disk / "registry.db")
assert "cannot be used" in registry.problem, registry.problem
assert not registry.learn({"later": footprint(2)}, 4.0)
mount("-o", "remount,rw")
assert registry.learn({"later": footprint(2)}, 5.0), registry.problem
assert registry.problem == "" and len(registry.footprints()) == 502
registry.close()
print("survived")
"""


class Ticks:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with closing(Registry(path)) as opened:
        yield opened


def filled(path: Path) -> bytes:
    """A sound registry of several pages, all in one file."""
    with closing(Registry(path)) as registry:
        registry.learn({f"key-{number}": footprint(number + 1) for number in range(500)}, 1.0)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"not a database at all" * 100,
        lambda data: b"SQLite format 3\0" + b"\xff" * 4096,
        lambda data: data[: len(data) // 2],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data[: 3 * 4096] + b"\x55" * 4096 + data[4 * 4096 :],
    ],
    ids=["text", "header only", "half", "less than a page", "nothing", "a page"],
)
def test_a_damaged_file_is_set_aside_with_all_its_parts(path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = damage(filled(path))
    path.write_bytes(data)
    path.with_name("registry.db-wal").write_bytes(b"rest")
    with closing(Registry(path)) as registry:
        assert registry.problem.startswith("the registry was damaged; the old file is ")
        (old,) = (found for found in path.parent.glob("registry.db.damaged-*") if not found.name.endswith(("-wal", "-shm")))
        assert old.read_bytes() == data
        assert str(old) in registry.problem
        assert registry.footprints() == {}
        assert registry.learn({"one": footprint(1)}, 1.0)
        assert set(registry.footprints()) == {"one"}
        assert registry.problem == ""


def test_damage_that_shows_while_it_runs_is_set_aside_too(path: Path) -> None:
    data = filled(path)
    clock = Ticks()
    with closing(Registry(path, clock=clock)) as registry:
        path.write_bytes(data[: 2 * 4096] + b"\x55" * (len(data) - 2 * 4096))
        registry._database.execute_sql("PRAGMA shrink_memory")  # what it has at hand would hide it for a while
        assert registry.footprints() == {}
        assert "malformed" in registry.problem
        assert registry.learn({"one": footprint(1)}, 1.0)
        assert set(registry.footprints()) == {"one"}
    assert list(path.parent.glob("registry.db.damaged-*"))


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
    many = {f"key-{number}": footprint(number + 1) for number in range(800)}
    with files_at_most(64 * 1024):
        assert not registry.learn(many, 2.0)
        assert registry.problem.startswith("the registry cannot be written: ")
        assert "no transaction" not in registry.problem
        assert set(registry.footprints()) == {"one"}
    assert registry.learn(many, 3.0)
    assert registry.problem == ""
    assert len(registry.footprints()) == 801


def test_a_disk_that_is_full_at_the_start_is_used_once_it_has_room(path: Path) -> None:
    clock = Ticks()
    with files_at_most(1024):
        registry = Registry(path, clock=clock)
        assert "cannot be used" in registry.problem
    with closing(registry):
        assert not registry.learn({"one": footprint(1)}, 1.0)  # it is not tried again at once
        clock.now = REOPEN_S
        assert registry.learn({"one": footprint(1)}, 1.0)
        assert (registry.problem, registry.opened) == ("", 1)
    assert not list(path.parent.glob("*damaged*"))


def test_a_file_that_somebody_else_holds_is_a_problem_and_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database._PRAGMAS, "busy_timeout", 50)
    with closing(Registry(path)) as registry, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not registry.learn({"one": footprint(1)}, 1.0)
        assert registry.problem == "the registry cannot be written: database is locked"
        other.execute("ROLLBACK")
        assert registry.learn({"one": footprint(1)}, 2.0)
        assert registry.problem == ""


def test_a_healthy_file_that_cannot_be_used_now_is_left_alone(
    registry: Registry, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.learn({"one": footprint(1)}, 1.0)
    registry.close()
    monkeypatch.setitem(database._PRAGMAS, "busy_timeout", 50)
    clock = Ticks()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE footprint SET samples = 1")
        second = Registry(path, clock=clock)
        assert "cannot be used" in second.problem
        assert not second.learn({"two": footprint(2)}, 2.0)
        other.execute("ROLLBACK")
    with closing(second):
        clock.now = REOPEN_S
        assert second.learn({"two": footprint(2)}, 2.0)
        assert set(second.footprints()) == {"one", "two"}
        assert second.problem == ""
    assert [found.name for found in path.parent.iterdir() if "damaged" in found.name] == []


def test_whoever_is_killed_in_a_storm_of_writes_loses_nothing_that_was_acknowledged(place: Place) -> None:
    target = place.url or str(place.file)
    for round_number in range(2):
        argv = [sys.executable, "-c", WRITER, target, f"round-{round_number}"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                if int(line) >= 40 + 17 * round_number:
                    break
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else int(line)
        with closing(Registry(place)) as registry:
            assert registry.problem == ""
            known = registry.footprints()
            for number in range(acknowledged + 1):
                assert known[f"round-{round_number}-{number}"].peak == number + 1
            assert len([key for key in known if key.startswith(f"round-{round_number}-")]) <= acknowledged + 2


def test_a_small_disk_that_fills_up_and_one_that_turns_read_only(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    argv = [unshare, "-m", sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "survived"


def test_a_server_that_goes_away_is_found_again(postgres_server: postgres.Postgres) -> None:
    place = Place(url=postgres_server.new_database())
    clock = Ticks()
    with closing(Registry(place, clock=clock)) as registry:
        assert registry.learn({"one": footprint(1)}, 1.0)
        postgres_server.stop()
        try:
            clock.now = 2 * REOPEN_S
            assert not registry.learn({"two": footprint(2)}, 2.0)
            assert registry.footprints() == {}
            assert registry.problem
            assert "unused-secret" not in registry.problem
        finally:
            postgres_server.start()
        clock.now = 4 * REOPEN_S
        assert registry.learn({"two": footprint(2)}, 2.0)
        assert set(registry.footprints()) == {"one", "two"}
        assert registry.problem == ""
        assert registry.opened == 2


def test_a_server_that_is_away_at_the_start_keeps_nobody_from_starting(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with closing(Registry(Place(url=f"postgresql://me:unused-secret@/x?host={tmp_path}"))) as registry:
        assert registry.problem.startswith(f"the registry postgresql://me:***@/x?host={tmp_path} cannot be used")
        assert not registry.write(Batch(loads=[load(1.0)]), 1.0)
        assert "unused-secret" not in registry.problem


def test_daemons_that_start_at_once_migrate_once(postgres_server: postgres.Postgres) -> None:
    url = postgres_server.new_database()
    script = (
        "import sys; from offloadd.registry.database import Place; from offloadd.registry.store import Registry;"
        "registry = Registry(Place(url=sys.argv[1])); assert not registry.problem, registry.problem"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, url], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for each in running:
        _, said = each.communicate(timeout=60)
        assert each.returncode == 0, said
