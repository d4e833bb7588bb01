"""What is done before anything is served: the less, the more of an earlier daemon's servers could answer already."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from offloadd.beginning import Beginning
from offloadd.state.desired import DesiredState, Engine
from offloadd.state.found import Shelf
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint, Placement
from offloadd.state.life import Life, ProcessId
from offloadd.units import Instant
from tests.fakes.parts import Part
from tests.unit.plan.build import spec

ENGINE = BackendName("x")
LIFE = Life(
    mark="mark",
    instance=InstanceId(LOCAL, ModelName("a"), 1),
    spec=spec("a"),
    backend=ENGINE,
    fingerprint="f",
    placement=Placement(reserved={}),
    endpoint=Endpoint(host="127.0.0.1", port=1),
    boot="boot",
    started_at=Instant(0),
)
CONFIG = DesiredState(engines={ENGINE: Engine(name=ENGINE, adapter="x")})
ALWAYS = ["executor.remember", "executor.take_over", "chronicle.start", "catalog.begin", "observer.know"]


async def begun(
    lives: list[Life], seen: Mapping[str, Any], *, config: DesiredState = CONFIG, alive: bool = True
) -> tuple[list[str], list[Life]]:
    """What was done, in its order, and what the executor was given to take over."""
    told: list[str] = []
    taken: list[Life] = []
    launcher = SimpleNamespace(
        boot="boot",
        find=lambda _: ProcessId(pid=7, started=1),
        adopt=lambda known, mark: SimpleNamespace(pid=known.pid) if alive else None,
        sweep=lambda *_: told.append("launcher.sweep"),
        sweep_home=lambda *_: 0,
    )
    chronicle = Part("chronicle", told, "start", start=Shelf(present=seen))
    chronicle.recorder = SimpleNamespace(footprints={})
    catalog = Part("catalog", told)
    catalog.discovery = Part("discovery", told, "first")
    parts: dict[str, Any] = {
        "backends": {"x": object()},
        "config": lambda: config,
        "lives": SimpleNamespace(lives=lambda: lives, exits=lambda _: {}, drop=lambda _: told.append("lives.drop")),
        "launcher": launcher,
        "executor": Part("executor", told, take_over=lambda orphans, _: taken.extend(life for life, _ in orphans)),
        "chronicle": chronicle,
        "catalog": catalog,
        "observer": Part("observer", told),
        "rounds": Part("rounds", told, "look_ahead"),
    }
    await Beginning(**parts).run()
    return told, taken


async def test_adopted_servers_of_remembered_models_wait_for_no_look() -> None:
    told, taken = await begun([LIFE], {"/a.gguf": object()})
    assert told == [*ALWAYS, "rounds.look_soon"]
    assert taken == [LIFE]


async def test_adopted_servers_of_forgotten_models_wait_for_the_search() -> None:
    told, taken = await begun([LIFE], {})
    assert told == [*ALWAYS, "discovery.first", "catalog.publish", "rounds.look_soon"]
    assert taken == [LIFE]


@pytest.mark.parametrize("seen", [{}, {"/a.gguf": object()}])
async def test_where_nothing_runs_the_machine_is_looked_at_first(seen: Mapping[str, Any]) -> None:
    told, taken = await begun([], seen)
    assert told == [*ALWAYS, "discovery.first", "catalog.publish", "rounds.look_ahead"]
    assert taken == []


@pytest.mark.parametrize("config", [DesiredState(), DesiredState(engines={ENGINE: Engine(name=ENGINE, adapter="gone")})])
async def test_servers_of_an_engine_that_nobody_speaks_for_are_not_taken_over(config: DesiredState) -> None:
    told, taken = await begun([LIFE], {"/a.gguf": object()}, config=config)
    assert told == ["lives.drop", *ALWAYS, "discovery.first", "catalog.publish", "rounds.look_ahead"]
    assert taken == []


async def test_what_ended_meanwhile_does_not_count_as_adopted() -> None:
    told, taken = await begun([LIFE], {"/a.gguf": object()}, alive=False)
    assert told == ["launcher.sweep", "lives.drop", *ALWAYS, "discovery.first", "catalog.publish", "rounds.look_ahead"]
    assert taken == []
