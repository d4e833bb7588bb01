"""A reload that fails for a reason of ours leaves the config in force, says so, and does not keep the next one from working."""

from __future__ import annotations

from pathlib import Path

from offloadd.backends import discover
from offloadd.clock import SystemClock
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
