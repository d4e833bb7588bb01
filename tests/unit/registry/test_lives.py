"""The daemon's own state on disk: what comes back, what is not written, and files that are full, held, damaged or newer."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from offloadd.errors import PermanentError
from offloadd.registry.lives import LifeBook
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, DeviceId, InstanceId, ModelName
from offloadd.state.launch import Endpoint, ExitCause, ExitKind, ExitStatus, Placement
from offloadd.state.life import Life, ProcessId
from offloadd.state.observed import ExitRecord
from offloadd.units import Bytes, Instant, Seconds

GPU = DeviceId(LOCAL, "GPU-1")
LIFE = Life(
    mark="a-3@0123",
    instance=InstanceId(LOCAL, ModelName("a"), 3),
    spec=ModelSpec(
        name=ModelName("a"), source="/models/a.gguf", backends=(BackendName("llamacpp"),), parallel=2, stop_timeout=Seconds(7)
    ),
    backend=BackendName("llamacpp"),
    fingerprint="f00d",
    footprint_key="key",
    identity="file-1",
    placement=Placement(reserved={GPU: Bytes(5), HOST_RAM: Bytes(7)}, gpus=(GPU,), split=(3,), asleep={GPU: Bytes(2)}),
    endpoint=Endpoint(host="127.0.0.1", port=4321, key="k"),
    boot="boot",
    started_at=Instant(12.5),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def read(path: Path) -> list[Life]:
    """What the next daemon finds."""
    book = LifeBook(path)
    try:
        return book.lives()
    finally:
        book.close()


def test_every_step_of_a_life_comes_back(path: Path) -> None:
    steps = [
        LIFE,
        replace(LIFE, process=ProcessId(pid=99, started=123456)),
        replace(LIFE, process=ProcessId(pid=99, started=123456), ready_at=Instant(14.0)),
        replace(LIFE, process=ProcessId(pid=99, started=123456), ready_at=Instant(14.0), asleep={GPU: Bytes(1)}),
        replace(LIFE, process=ProcessId(pid=99, started=123456), ready_at=Instant(14.0), stopping="idle"),
    ]
    for life in steps:
        book = LifeBook(path)
        book.keep(life)
        book.close()
        assert read(path) == [life]
    book = LifeBook(path)
    book.drop(LIFE.mark)
    book.close()
    assert read(path) == []


def test_no_secret_is_written(path: Path) -> None:
    spec = replace(LIFE.spec, env={"HF_TOKEN": "canary-secret"}, args=("--key", "canary-secret"))
    book = LifeBook(path)
    book.keep(replace(LIFE, spec=spec))
    book.close()
    assert path.stat().st_mode & 0o777 == 0o600, "it holds the keys of running servers"
    assert all(b"canary-secret" not in part.read_bytes() for part in path.parent.iterdir())


def test_a_held_file_is_said_and_caught_up_with(path: Path) -> None:
    book = LifeBook(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        book.keep(LIFE)
        assert "cannot be written" in book.problem
        assert book.lives() == [LIFE], "memory has it all the same"
        other.execute("ROLLBACK")
    book.retry()
    assert book.problem == ""
    book.close()
    assert read(path) == [LIFE]


def test_a_full_disk_is_said_and_caught_up_with(path: Path) -> None:
    book = LifeBook(path)
    book.keep(LIFE)
    pages = book._database.execute_sql("PRAGMA page_count").fetchone()[0]
    book._database.execute_sql(f"PRAGMA max_page_count = {pages}")
    second = replace(LIFE, mark="b", identity="x" * 20_000)
    book.keep(second)
    assert "full" in book.problem
    book._database.execute_sql("PRAGMA max_page_count = 100000")
    book.keep(replace(LIFE, mark="c"))
    assert book.problem == ""
    book.close()
    assert {life.mark for life in read(path)} == {LIFE.mark, "b", "c"}


def test_a_folder_that_cannot_be_written_leaves_memory(tmp_path: Path) -> None:
    book = LifeBook(tmp_path / "not there" / "state.db")
    assert "cannot be used" in book.problem
    book.keep(LIFE)
    assert book.lives() == [LIFE]
    assert "cannot be used" in book.problem, "and it stays said"
    book.close()


@pytest.mark.parametrize("spoil", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_set_aside(path: Path, spoil: bytes) -> None:
    path.write_bytes(spoil)
    book = LifeBook(path)
    assert book.lives() == []
    assert "was damaged" in book.problem
    book.keep(LIFE)
    assert "was damaged" in book.problem, "one good write does not make it unsaid"
    book.close()
    (aside,) = path.parent.glob("state.db.damaged-*")
    assert aside.read_bytes() == spoil
    assert read(path) == [LIFE]


def test_a_file_that_was_cut_off_in_the_middle(path: Path) -> None:
    book = LifeBook(path)
    for number in range(200):
        book.keep(replace(LIFE, mark=f"m{number}"))
    book.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    book = LifeBook(path)
    assert "was damaged" in book.problem
    book.close()


def test_a_newer_file_is_refused_and_left_as_it_is(path: Path) -> None:
    LifeBook(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(PermanentError, match=r"state\.db has schema 99"):
        LifeBook(path)
    assert path.read_bytes() == before


def test_a_row_that_cannot_be_read_is_one_that_nobody_vouches_for(path: Path) -> None:
    book = LifeBook(path)
    book.keep(LIFE)
    book.close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("insert into life values (?, ?)", ("odd", json.dumps({"model": "a"})))
    assert read(path) == [LIFE]


def ended(number: int) -> ExitRecord:
    return ExitRecord(
        instance=InstanceId(LOCAL, ModelName("a"), number),
        backend=BackendName("llamacpp"),
        fingerprint="f00d",
        identity="file-1",
        at=Instant(20.0 + number),
        status=ExitStatus(signal=9),
        cause=ExitCause(kind=ExitKind.KILLED, message="killed", permanent=True),
        expected=False,
        ready_for=Seconds(3),
        tail=("a line",),
    )


def test_ends_come_back_in_the_same_boot_and_only_there(path: Path) -> None:
    book = LifeBook(path)
    book.keep_exits("boot", ModelName("a"), (ended(1),))
    book.keep_exits("boot", ModelName("a"), (ended(1), ended(2)))
    book.keep_exits("boot", ModelName("b"), (ended(1),))
    book.keep_exits("boot", ModelName("b"), ())
    book.close()
    book = LifeBook(path)
    assert book.exits("boot") == {"a": (ended(1), ended(2))}
    assert book.exits("another") == {}
    book.forget_exits()
    assert book.exits("boot") == {}
    book.close()


def test_a_file_of_the_first_schema_is_brought_up_to_date(path: Path) -> None:
    book = LifeBook(path)
    book.keep(LIFE)
    book.close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("DROP TABLE exits")
        other.execute("PRAGMA user_version = 1")
    assert read(path) == [LIFE]


def test_what_comes_and_goes_while_nothing_can_be_written_leaves_nothing_behind(path: Path) -> None:
    book = LifeBook(path)
    book.keep(LIFE)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for number in range(3):
            book.keep(replace(LIFE, mark=f"m{number}"))
            book.drop(f"m{number}")
        book.drop(LIFE.mark)
        assert len(book._unwritten) == 1, "the row that the file has"
        other.execute("ROLLBACK")
    book.retry()
    book.close()
    assert read(path) == []
