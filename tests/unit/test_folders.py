"""Events of folders: with real folders, told by the kernel."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from offloadd import folders
from offloadd.folders import FolderWatch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "STEP_MS", 20)
    monkeypatch.setattr(folders, "GATHERED_MS", 100)


class Heard:
    """Counts what is told."""

    def __init__(self) -> None:
        self.times = 0
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self.event.set()

    async def begin(self, folder: Path) -> FolderWatch:
        """A watch that is up: it has told of files that came and went, and of nothing since."""
        watch = FolderWatch([folder], self)
        async with asyncio.timeout(10):
            while not self.times:
                (folder / "probe").touch()
                (folder / "probe").unlink()
                await asyncio.sleep(0.01)
        await self.silence()
        return watch

    async def again(self) -> None:
        async with asyncio.timeout(10):
            await self.event.wait()
        self.event.clear()

    async def silence(self) -> None:
        """Until nothing was told for longer than events are gathered."""
        self.event.set()
        with suppress(TimeoutError):
            while self.event.is_set():
                self.event.clear()
                async with asyncio.timeout(2 * folders.GATHERED_MS / 1000):
                    await self.event.wait()
        self.times = 0


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


async def test_nothing_is_told_of_reading(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("text")
    heard = Heard()
    watch = await heard.begin(tmp_path)
    try:
        (tmp_path / "log").read_text()
        list(tmp_path.iterdir())
        await heard.silence()
        assert not heard.event.is_set()
        (tmp_path / "log").write_text("other")
        await heard.again()
    finally:
        watch.stop()


async def test_after_its_end_nothing_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    heard = Heard()
    watch = await heard.begin(tmp_path)
    (tmp_path / "a").touch()
    watch.stop()
    watch.stop()
    early = FolderWatch([tmp_path], heard)
    early.stop()  # while it is set up
    (tmp_path / "b").touch()
    async with asyncio.timeout(10):
        while any(thread.name == "watch of folders" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    assert heard.times == 0
    async with asyncio.timeout(10):  # the library's own thread gives back what it had a moment after ours has ended
        while len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.01)


async def test_a_folder_that_is_not_there_is_a_problem_that_is_told(tmp_path: Path) -> None:
    watch = FolderWatch([tmp_path, tmp_path / "gone"], Heard())
    async with asyncio.timeout(10):
        while not watch.problem:
            await asyncio.sleep(0.01)
    assert "No such file or directory" in watch.problem or "No path was found" in watch.problem
    assert str(tmp_path / "gone") in watch.problem
