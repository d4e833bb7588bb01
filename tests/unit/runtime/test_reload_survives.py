"""A reload that fails for a reason of ours leaves the config in force, says so, and does not keep the next one from working."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from offloadd.backends import discover
from offloadd.clock import SystemClock
from offloadd.runtime import reload
from offloadd.runtime.reload import ConfigStore
from offloadd.state.desired import DesiredState

CONFIG = "models: {{m: {{source: m.gguf, context: {context}}}}}\n"


async def test_an_error_ahead_of_the_swap_changes_nothing_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "offloadd.yaml"
    path.write_text(CONFIG.format(context=1024))
    store = ConfigStore(path, backends=discover(), clock=SystemClock())
    await store.start()
    broken = [FileNotFoundError("a disk went away")]

    async def before(_: DesiredState) -> None:
        if broken:
            raise broken.pop()

    store.follow(before=before, after=lambda: None)
    path.write_text(CONFIG.format(context=2048))
    attempt = await store.reload("test")
    assert not attempt.applied
    assert attempt.message == "internal error: FileNotFoundError: a disk went away"
    assert store.attempt is attempt
    assert store.applied.desired.generation == 1
    assert (await store.reload("again")).applied
    assert next(iter(store.applied.desired.models.values())).context == 2048


async def test_without_a_watch_left_the_file_is_looked_at_now_and_then_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise OSError("inotify limit reached")

    path = tmp_path / "offloadd.yaml"
    path.write_text(CONFIG.format(context=1024))
    store = ConfigStore(path, backends=discover(), clock=SystemClock())
    await store.start()
    monkeypatch.setattr(reload, "POLL", 0.01)
    real = reload.watchfiles.awatch
    monkeypatch.setattr(reload.watchfiles, "awatch", none_left)
    watching = asyncio.create_task(store.watch())
    try:
        async with asyncio.timeout(20):
            while not store.blind:
                await asyncio.sleep(0.01)
            path.write_text(CONFIG.format(context=2048))
            while store.applied.desired.generation < 2:
                await asyncio.sleep(0.01)
            assert "inotify limit reached" in store.blind
            monkeypatch.setattr(reload.watchfiles, "awatch", real)
            while store.blind:
                await asyncio.sleep(0.01)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
