"""A reload that fails for a reason of ours leaves the config in force, says so, and does not keep the next one from working."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import watchfiles

from offloadd import redaction
from offloadd.backends import discover
from offloadd.clock import SystemClock
from offloadd.errors import PermanentError
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
    real = watchfiles.watch
    monkeypatch.setattr(watchfiles, "watch", none_left)
    watching = asyncio.create_task(store.watch())
    try:
        async with asyncio.timeout(20):
            while not store.blind:
                await asyncio.sleep(0.01)
            path.write_text(CONFIG.format(context=2048))
            while store.applied.desired.generation < 2:
                await asyncio.sleep(0.01)
            assert "inotify limit reached" in store.blind
            monkeypatch.setattr(watchfiles, "watch", real)
            while store.blind:
                await asyncio.sleep(0.01)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_a_reload_that_hangs_is_given_up_and_told_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "offloadd.yaml"
    path.write_text(CONFIG.format(context=1024))
    store = ConfigStore(path, backends=discover(), clock=SystemClock())
    await store.start()
    told: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        told.append("begins")
        yield
        told.append("applied" if store.attempt.applied else store.attempt.message)

    async def before(_: DesiredState) -> None:
        await asyncio.Event().wait()

    store.follow(before=before, after=lambda: None, around=around)
    monkeypatch.setattr(reload, "LIMIT", 0.05)
    attempt = await store.reload("test")
    assert told == ["begins", "reading it took longer than 0.05 s"]
    assert (attempt.applied, store.applied.desired.generation) == (False, 1)

    async def refuse(_: DesiredState) -> None:
        raise PermanentError("not with these sockets", hint="try others")

    store.follow(before=refuse, after=lambda: None, around=around)
    assert (await store.reload("test")).message == "not with these sockets: try others"


async def test_what_a_config_looks_up_and_what_it_spells_out_is_kept_out_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("canary-from-a-file\n")
    monkeypatch.setenv("OFFLOADD_TEST_SECRET", "canary-from-a-variable")
    keys = [f"${{file:{tmp_path}/key}}", "${env:OFFLOADD_TEST_SECRET}", "canary-spelled-out-in-it"]
    listed = [{"name": f"k{number}", "key": key, "scopes": ["admin"]} for number, key in enumerate(keys)]
    path = tmp_path / "offloadd.json"
    path.write_text(json.dumps({"server": {"auth": {"keys": listed}}, "models": {}}))
    store = ConfigStore(path, backends=discover(), clock=SystemClock())
    try:
        await store.start()
        written = redaction.clean("canary-from-a-file canary-from-a-variable canary-spelled-out-in-it canary-of-nobody")
        assert written == "*** *** *** canary-of-nobody"
    finally:
        redaction._known.clear()
        redaction.hide([])
