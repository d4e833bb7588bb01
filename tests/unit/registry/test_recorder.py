"""What is gathered on the loop reaches the registry, whatever happens to its disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from offloadd.registry import store
from offloadd.registry.recorder import Recorder
from offloadd.registry.store import Registry
from offloadd.state.history import Usage
from offloadd.state.ids import ModelName
from offloadd.state.served import Fate, Served
from offloadd.units import Instant, Seconds
from tests.unit.registry.test_store import A, end, footprint, load

DAY = "2027-01-15"
WALL = 1_800_000_000.0


def served(fate: Fate = Fate.ANSWERED, model: ModelName | None = A, **figures: int) -> Served:
    times = {"arrived": Instant(1.0), "duration": Seconds(0.5)}
    return Served(request="r", path="/v1/x", dialect="openai", fate=fate, status=200, model=model, **times, **figures)  # type: ignore[arg-type]


@asynccontextmanager
async def hindered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Registry, Recorder, Callable[[], None]]]:
    """A registry that cannot be used, its recorder, and what takes away what is in the way; it is tried again at every call."""
    monkeypatch.setattr(store, "REOPEN_S", 0.0)
    folder = tmp_path / "data"
    folder.write_text("in the way")

    def mend() -> None:
        folder.unlink()
        folder.mkdir()

    with closing(Registry(folder / "registry.db")) as registry:
        recorder = Recorder(registry, lambda: WALL)
        await recorder.start()
        yield registry, recorder, mend


async def test_everything_told_is_written_once(tmp_path: Path) -> None:
    with closing(Registry(tmp_path / "registry.db")) as registry:
        recorder = Recorder(registry, lambda: WALL)
        await recorder.start()
        recorder.loaded(load(WALL))
        recorder.ended(end(WALL))
        recorder.learn({"k": footprint(5)})
        recorder.served(served(prompt_tokens=10, cached_tokens=4, completion_tokens=3))
        recorder.served(served(Fate.CANCELLED, completion_tokens=1))
        recorder.served(served(Fate.REFUSED, model=None))
        for _ in range(2):
            assert await recorder.flush()
        day = Usage(answered=1, cancelled=1, prompt_tokens=10, cached_tokens=4, completion_tokens=4, seconds=1.0)
        history = registry.history(A)
        assert (len(history.loads), len(history.ends), history.days) == (1, 1, {DAY: day})
        assert registry.footprints() == {"k": footprint(5)}
        assert recorder.totals == {A: day}
    with closing(Registry(tmp_path / "registry.db")) as again:
        later = Recorder(again, lambda: WALL)
        await later.start()
        assert later.totals == {A: day}
        later.served(served())
        assert later.totals[A].answered == 2


async def test_nothing_is_lost_while_the_registry_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hindered(tmp_path, monkeypatch) as (registry, recorder, mend):
        for number in range(3):
            recorder.served(served())
            recorder.loaded(load(WALL + number))
            assert not await recorder.flush()
        assert "cannot be used" in registry.problem
        assert recorder.totals[A].answered == 3
        mend()
        assert await recorder.flush()
        assert registry.problem == ""
        history = registry.history(A)
        assert history.days == {DAY: Usage(answered=3, seconds=1.5)}
        assert len(history.loads) == 3
        assert recorder.totals == {A: Usage(answered=3, seconds=1.5)}


async def test_footprints_of_an_older_offloadd_move(tmp_path: Path) -> None:
    with closing(Registry(tmp_path / "registry.db")) as registry:
        registry.learn({"former": footprint(5)}, 1.0)
        recorder = Recorder(registry, lambda: WALL)
        await recorder.start()
        recorder.move({"former": "new"})
        assert recorder.footprints == {"new": footprint(5)}
        assert await recorder.flush()
        assert registry.footprints() == {"new": footprint(5)}


async def test_it_says_when_something_waits_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hindered(tmp_path, monkeypatch) as (_, recorder, mend):
        assert not recorder.told.is_set()
        recorder.served(served())
        assert recorder.told.is_set()
        assert recorder.totals[A].answered == 1  # which takes it to what waits
        assert not await recorder.flush()
        assert recorder.told.is_set()
        mend()
        assert await recorder.flush()
        assert not recorder.told.is_set()
        for tell in (
            lambda: recorder.served(served()),
            lambda: recorder.loaded(load(WALL)),
            lambda: recorder.ended(end(WALL)),
            lambda: recorder.learn({"k": footprint(5)}),
            lambda: recorder.move({"k": "l"}),
            lambda: recorder.found({"/x.gguf": None}),
        ):
            tell()
            assert recorder.told.is_set()
            assert await recorder.flush()
            assert not recorder.told.is_set()
