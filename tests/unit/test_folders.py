"""Events of folders: with real folders, told by the kernel."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from offloadd import folders
from offloadd.folders import FolderWatch


class Heard:
    """Counts what is told; `watch` is up when `begin` returns."""

    def __init__(self) -> None:
        self.times = 0
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self.event.set()

    async def begin(self, *watched: Path) -> FolderWatch:
        watch = FolderWatch(watched, self)
        async with asyncio.timeout(10):
            while watch._handle < 0 and not watch.problem:
                await asyncio.sleep(0.001)
        return watch

    async def again(self) -> None:
        async with asyncio.timeout(10):
            await self.event.wait()
        self.event.clear()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is made": lambda folder: (folder / "new").touch(),
    "a file is written": lambda folder: (folder / "old").write_text("other"),
    "a file is renamed over another": lambda folder: (folder / "old").rename(folder / "older"),
    "a file is moved away": lambda folder: (folder / "old").rename(folder.parent / "elsewhere"),
    "a file is deleted": lambda folder: (folder / "old").unlink(),
    "a file is opened to others": lambda folder: (folder / "old").chmod(0o600),
    "a link is made": lambda folder: (folder / "link").symlink_to("old"),
    "a folder is made": lambda folder: (folder / "sub").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
async def test_it_is_told_when(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    for name in ("old", "older"):
        (folder / name).write_text("text")
    heard = Heard()
    watch = await heard.begin(folder)
    try:
        change(folder)
        await heard.again()
    finally:
        watch.stop()


async def test_events_go_on_being_told_and_a_burst_is_told_once(tmp_path: Path) -> None:
    heard = Heard()
    watch = await heard.begin(tmp_path)
    try:
        for _ in range(3):
            for number in range(100):
                (tmp_path / str(number)).touch()
            await heard.again()
        assert heard.times <= 6
    finally:
        watch.stop()


async def test_nothing_is_told_of_reading_and_of_each_part_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "GATHERED_S", 0.001)
    (tmp_path / "log").write_text("text")
    heard = Heard()
    watch = await heard.begin(tmp_path)
    try:
        with (tmp_path / "log").open("a") as file:
            for _ in range(10):
                file.write("line\n")
                file.flush()
                (tmp_path / "log").read_text()
                await asyncio.sleep(0.002)
            assert heard.times == 0
        await heard.again()
    finally:
        watch.stop()


async def test_after_its_end_nothing_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    heard = Heard()
    watch = await heard.begin(tmp_path)
    (tmp_path / "a").touch()
    await asyncio.sleep(folders.GATHERED_S / 2)
    watch.stop()
    watch.stop()
    (tmp_path / "b").touch()
    await asyncio.sleep(2 * folders.GATHERED_S)
    early = FolderWatch([tmp_path], heard)
    early.stop()  # while it is set up
    while any(thread.name == "watch of folders" for thread in threading.enumerate()):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    assert heard.times == 0
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_folder_that_is_not_there_is_a_problem_that_is_told(tmp_path: Path) -> None:
    watch = await Heard().begin(tmp_path, tmp_path / "gone")
    assert watch.problem == f"[Errno 2] {tmp_path / 'gone'} cannot be watched: No such file or directory"
    (tmp_path / "file").touch()
    assert "Not a directory" in (await Heard().begin(tmp_path / "file")).problem
