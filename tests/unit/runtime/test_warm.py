"""Files are read into the page cache, and no further than wanted: with real files, and the kernel is asked what it holds."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from offloadd.events import EventKind, event_of
from offloadd.registry.content import parts_of
from offloadd.runtime import warm as module
from offloadd.runtime.warm import STEP, Warmer
from offloadd.state.actions import Warm
from offloadd.state.ids import ModelName
from offloadd.units import Bytes

SIZE = 4 * STEP


def cached(path: Path) -> float:
    """Share of the file that is in the page cache, by mincore()."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        pages = (ctypes.c_ubyte * (-(-len(mapped) // mmap.PAGESIZE)))()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), pages)
        del view
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) / len(pages)


def cold(path: Path, size: int = SIZE) -> Path:
    """A file of which the kernel holds nothing."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps its files in RAM anyway")
    return path


def wanted(*paths: Path, identity: str = "1") -> Warm:
    return Warm(model=ModelName("m"), paths=tuple(map(str, paths)), identity=identity, size=Bytes(SIZE), sentence="m may be next")


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended() -> bool:
    return not any(thread.name == "warm" for thread in threading.enumerate())


def test_a_cold_file_is_in_the_page_cache_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = cold(tmp_path / "model.gguf")
    warmer = Warmer(parts_of)
    warmer.follow(wanted(path))
    until(ended)
    assert cached(path) == 1.0
    said = [event_of(record) for record in caplog.records]
    assert [(each.kind, each.data["state"]) for each in said if each] == [
        (EventKind.MODEL_WARMED, "begun"),
        (EventKind.MODEL_WARMED, "done"),
    ]


def test_all_shards_of_a_split_model_are_read(tmp_path: Path) -> None:
    paths = [cold(tmp_path / f"m-{number:05}-of-00003.gguf") for number in (1, 2, 3)]
    Warmer(parts_of).follow(wanted(paths[0]))
    until(ended)
    assert [cached(path) for path in paths] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("end", [lambda warmer: warmer.follow(None), Warmer.stop], ids=["the plan", "the daemon"])
def test_it_stops_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[Warmer], None]) -> None:
    path = cold(tmp_path / "model.gguf")
    first, go_on = threading.Event(), threading.Event()
    real = os.preadv

    def preadv(*args: object) -> int:
        taken = real(*args)  # type: ignore[arg-type]
        first.set()
        assert go_on.wait(30)
        return taken

    monkeypatch.setattr(module.os, "preadv", preadv)
    warmer = Warmer(parts_of)
    warmer.follow(wanted(path))
    assert first.wait(30)
    end(warmer)
    go_on.set()
    until(ended)
    assert cached(path) < 0.75


def test_a_plan_that_says_the_same_begins_nothing_anew_and_another_one_does(tmp_path: Path) -> None:
    looked: list[Path] = []

    def parts(path: Path) -> list[Path]:
        looked.append(path)
        return []

    warmer = Warmer(parts)
    for warm in (wanted(tmp_path / "a"), wanted(tmp_path / "a"), wanted(tmp_path / "b", identity="2"), None, None):
        warmer.follow(warm)
        until(ended)
    assert looked == [tmp_path / "a", tmp_path / "b"]
    warmer.follow(wanted(tmp_path / "a"))
    until(ended)
    assert looked == [tmp_path / "a", tmp_path / "b", tmp_path / "a"]


def test_a_file_that_is_gone_is_told_and_nothing_else_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Warmer(parts_of).follow(wanted(tmp_path / "gone.gguf"))
    until(ended)
    assert "its files could not be read ahead" in caplog.text


def test_everybody_else_goes_first(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def parts(_: Path) -> list[Path]:
        own = threading.get_native_id()
        seen.append((os.getpriority(os.PRIO_PROCESS, own), psutil.Process(own).ionice().ioclass))
        return []

    before = os.getpriority(os.PRIO_PROCESS, os.getpid())
    Warmer(parts).follow(wanted(tmp_path / "a"))
    until(ended)
    assert seen == [(19, psutil.IOPRIO_CLASS_IDLE)]
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == before
