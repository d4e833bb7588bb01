"""The observer: readings that fail, hang or come late, and what is made of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from offloadd.backends.llamacpp import BACKEND
from offloadd.errors import TemporaryError
from offloadd.observe import snapshot
from offloadd.observe.snapshot import Observer
from offloadd.state.desired import DesiredState, Engine, ModelSpec, StorageSpec
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import Footprint
from offloadd.state.observed import DeviceView, InstanceState, ObservedState
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes, Seconds
from tests.unit.plan.build import gib, ram, view

GPU = DeviceView(id=DeviceId(LOCAL, "GPU-0"), kind=DeviceKind.NVIDIA, name="card", total=gib(24), free=gib(20))
ENGINE = Engine(name=BackendName("llamacpp"), adapter="llamacpp", command=("/bin/true",))


class Reader:
    """Gives `views`, or raises `error`, or waits for `gate`."""

    def __init__(self, name: str, *views: DeviceView) -> None:
        self.name = name
        self.views = views
        self.error: Exception | None = None
        self.gate: threading.Event | None = None
        self.problems: Mapping[str, str] = {}
        self.calls = 0

    def read(self) -> Sequence[DeviceView]:
        self.calls += 1
        if self.gate:
            self.gate.wait(10)
        if self.error:
            raise self.error
        return self.views


@pytest.fixture
def cards() -> Reader:
    return Reader("nvidia", GPU)


@pytest.fixture
def observer(cards: Reader, monkeypatch: pytest.MonkeyPatch) -> Observer:
    monkeypatch.setattr(snapshot, "READ_TIMEOUT", Seconds(0.2))
    return Observer(
        [Reader("host", ram()), cards], {"llamacpp": BACKEND}, lambda path: ModelShape(architecture="llama"), lambda path: path.name
    )


def desired(folder: Path, **models: dict[str, object]) -> DesiredState:
    specs = {
        ModelName(name): ModelSpec(**{"name": ModelName(name), "source": f"{name}.gguf", "backends": (ENGINE.name,)} | fields)  # type: ignore[arg-type]
        for name, fields in models.items()
    }
    return DesiredState(storage=StorageSpec(models_path=(str(folder),)), engines={ENGINE.name: ENGINE}, models=specs)


async def test_all_that_is_read_is_shown(observer: Observer) -> None:
    await observer.read_memory(dict)
    assert set(observer.devices) == {HOST_RAM, GPU.id}
    assert observer.problems == {}
    assert observer.blind == ""


async def test_a_reader_that_fails_takes_only_its_own_away(observer: Observer, cards: Reader) -> None:
    cards.error = TemporaryError("NVIDIA driver: gone", retry_after=Seconds(1), hint="modprobe nvidia")
    await observer.read_memory(dict)
    assert set(observer.devices) == {HOST_RAM}
    assert observer.problems == {"reading of nvidia devices": "failed: NVIDIA driver: gone; modprobe nvidia"}
    assert observer.blind == "nvidia devices cannot be read: failed: NVIDIA driver: gone; modprobe nvidia"
    cards.error = None
    await observer.read_memory(dict)
    assert set(observer.devices) == {HOST_RAM, GPU.id}
    assert (observer.problems, observer.blind) == ({}, "")


async def test_one_that_hangs_is_left_and_not_asked_again(observer: Observer, cards: Reader) -> None:
    cards.gate = threading.Event()
    await observer.read_memory(dict)
    assert observer.problems == {"reading of nvidia devices": "gave nothing within 0.2 s"}
    for _ in range(3):
        await observer.read_memory(dict)
    assert cards.calls == 1
    assert set(observer.devices) == {HOST_RAM}
    assert "has not returned" in observer.blind
    cards.gate.set()
    cards.gate = None
    async with asyncio.timeout(5):
        while GPU.id not in observer.devices:
            await observer.read_memory(dict)
    assert observer.problems == {}


async def test_one_that_fails_after_its_deadline_is_heard_by_nobody(
    observer: Observer, cards: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    cards.gate, cards.error = threading.Event(), OSError("too late")
    await observer.read_memory(dict)
    cards.gate.set()
    async with asyncio.timeout(5):
        while cards.calls < 2:
            await observer.read_memory(dict)
    assert observer.problems == {"reading of nvidia devices": "failed: too late"}
    assert "never retrieved" not in caplog.text


async def test_a_card_that_is_lost_makes_nobody_blind_who_sees_another(observer: Observer, cards: Reader) -> None:
    cards.problems = {"GPU-1": "it is lost"}
    await observer.read_memory(dict)
    assert observer.problems == {"device GPU-1": "it is lost"}
    assert observer.blind == ""
    cards.views = ()
    await observer.read_memory(dict)
    assert observer.blind == "nvidia devices cannot be read: GPU-1: it is lost"


async def test_a_card_whose_processes_are_not_told_is_used_and_a_problem(observer: Observer, cards: Reader) -> None:
    cards.views = (replace(GPU, problem="not told"),)
    await observer.read_memory(dict)
    assert GPU.id in observer.devices
    assert observer.problems == {"device GPU-0": "not told"}


async def test_candidates_are_made_from_files_engines_and_what_was_learned(observer: Observer, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" * 1000)
    config = desired(tmp_path, a={}, missing={})
    await observer.refresh(lambda: config, dict)
    (found,) = observer.candidates[ModelName("a")]
    (missing,) = observer.candidates[ModelName("missing")]
    assert found.fingerprint
    assert found.estimate is not None
    assert not found.estimate.learned
    assert "does not exist" in missing.problem
    observer.know({found.footprint_key: Footprint(model=ModelName("a"), backend=ENGINE.name, peak=Bytes(12345))})
    await observer.consider(lambda: config)
    (again,) = observer.candidates[ModelName("a")]
    assert again.estimate is not None
    assert (again.estimate.total, again.fingerprint) == (12345, found.fingerprint)


async def test_where_nothing_has_changed_candidates_are_as_they_were(observer: Observer, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"12345")
    one = desired(tmp_path, a={})

    async def again(config: DesiredState = one) -> bool:
        """Whether a look works the candidates out anew."""
        before = observer.candidates
        await observer.refresh(lambda: config, dict)
        return observer.candidates is not before

    assert await again()
    assert not await again()
    (tmp_path / "a.gguf").write_bytes(b"123456")
    assert await again()
    observer.know({})
    assert await again()
    assert await again(replace(one, engines={ENGINE.name: replace(ENGINE, command=("/bin/false",))}))
    assert await again()
    assert not await again()


async def test_an_engine_that_is_not_there_is_a_problem_of_its_models(observer: Observer, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    config = desired(tmp_path, a={})
    broken = replace(ENGINE, command=("no-such-program-anywhere",))
    await observer.refresh(lambda: replace(config, engines={ENGINE.name: broken}), dict)
    (found,) = observer.candidates[ModelName("a")]
    assert "no-such-program-anywhere" in found.problem
    assert found.hint


async def test_the_dead_hold_nothing_that_is_measured(observer: Observer) -> None:
    await observer.read_memory(dict)
    alive, dead = view("a-1", 1), view("b-1", 1, InstanceState.EXITED)
    await observer.read_memory(lambda: {alive.id: 1, dead.id: 1})
    seen = observer.snapshot(ObservedState(instances={each.id: each for each in (alive, dead)}))
    assert HOST_RAM in seen.instances[alive.id].measured
    assert seen.instances[dead.id].measured == {}
    assert HOST_RAM in seen.instances[dead.id].peak
    assert seen.devices == observer.devices
