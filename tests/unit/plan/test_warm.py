"""Whose files are read ahead, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.plan.planner import plan
from offloadd.state.actions import Warm
from offloadd.state.demand import Demand, Loan
from offloadd.state.desired import DesiredState, RunMode, StorageSpec
from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import Instant
from tests.unit.plan.build import HOST_RAM, NOW, gib, key, offer, ram, spec, view, waits

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")


def on_disk(name: str, size: float = 4.0, **fields: object) -> object:
    facts = ModelFacts(path=f"/models/{name}", identity=f"file-{name}", size=gib(size), **fields)  # type: ignore[arg-type]
    return replace(offer(size), facts=facts)


class Calm:
    """A was used a minute ago and B an hour ago, C never; all are off, and 12 of 16 GiB are free."""

    def __init__(self) -> None:
        self.desired = DesiredState(models={name: spec(name) for name in (A, B, C)}, storage=StorageSpec(warm_next=True))
        self.observed = ObservedState(devices={HOST_RAM: ram(free=12.0)}, candidates={name: (on_disk(name),) for name in (A, B, C)})
        self.demand = Demand(last_used={B: Instant(NOW - 3600), A: Instant(NOW - 60)})

    def warm(self) -> Warm | None:
        return plan(self.desired, self.observed, self.demand, now=NOW).warm

    def named(self) -> str | None:
        warm = self.warm()
        return warm.model if warm else None

    def has(self, *views: object) -> Calm:
        self.observed = replace(self.observed, instances={one.id: one for one in views})  # type: ignore[attr-defined]
        return self

    def free(self, gigabytes: float) -> Calm:
        self.observed = replace(self.observed, devices={HOST_RAM: ram(free=gigabytes)})
        return self


def test_the_model_that_was_used_last_and_is_off() -> None:
    calm = Calm()
    assert calm.warm() == Warm(
        model=A,
        paths=("/models/a",),
        identity="file-a",
        size=gib(4),
        sentence="a was used 1 min ago and may be next: its 4.0 GiB are read into the page cache",
    )
    assert calm.has(view("a-1", 1.0)).named() == "b"
    assert calm.has(view("a-1", 1.0), view("b-1", 1.0)).named() is None


def test_nobody_who_did_not_ask_for_it() -> None:
    calm = Calm()
    calm.desired = replace(calm.desired, storage=StorageSpec())
    assert calm.named() is None


def test_only_what_a_request_would_load() -> None:
    calm = Calm()
    calm.desired = replace(calm.desired, models={**calm.desired.models, A: spec("a", run=RunMode.NEVER)})
    assert calm.named() == "b"
    calm.desired = replace(calm.desired, models={A: spec("a", run=RunMode.ALWAYS)})
    assert calm.named() is None


@pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.LOADING, InstanceState.DRAINING, InstanceState.STOPPING])
def test_not_while_anything_loads_or_is_on_its_way_out(state: InstanceState) -> None:
    drains = {"drain_deadline": Instant(NOW + 60)} if state is InstanceState.DRAINING else {}
    calm = Calm().has(view("c-1", 1.0, state, **drains))
    calm.demand = replace(calm.demand, leases={key("c-1"): 1})
    assert calm.named() is None


def test_not_while_anybody_waits() -> None:
    calm = Calm()
    calm.demand = replace(calm.demand, waiting={C: waits()})
    assert calm.named() is None
    calm.demand = Demand(last_used=calm.demand.last_used, loans={"l": Loan(id="l", size=gib(100), since=Instant(NOW - 1))})
    assert calm.named() is None


def test_requests_that_run_are_no_obstacle() -> None:
    calm = Calm().has(view("c-1", 1.0))
    calm.demand = replace(calm.demand, leases={key("c-1"): 3})
    assert calm.named() == "a"


def test_not_where_memory_is_tight() -> None:
    assert Calm().free(4 + 16 / 5 + 0.01).named() == "a"
    assert Calm().free(4 + 16 / 5 - 0.01).named() is None
    calm = Calm().free(4 + 16 / 5 + 1).has(view("c-1", 2.0, measured={HOST_RAM: gib(0.5)}))
    assert calm.named() is None, "what was promised and is not taken yet is not free"
    calm.observed = replace(calm.observed, devices={})
    assert calm.named() is None, "unknown is not free"


def test_one_that_fits_goes_before_one_that_does_not() -> None:
    calm = Calm()
    calm.observed = replace(calm.observed, candidates={**calm.observed.candidates, A: (on_disk("a", 10.0),)})
    assert calm.named() == "b"


def test_what_is_not_on_this_disk_is_not_read() -> None:
    calm = Calm()
    hub = replace(offer(1.0), facts=ModelFacts(path="org/a", size=gib(0)))
    broken = replace(on_disk("a"), problem="gone")  # type: ignore[type-var]
    calm.observed = replace(calm.observed, candidates={A: (hub, broken), B: (on_disk("b"),)})  # type: ignore[dict-item]
    assert calm.named() == "b"


def test_what_is_loaded_beside_a_model_is_read_with_it_from_where_it_lies() -> None:
    calm = Calm()
    beside = {"mmproj.gguf": ModelFacts(path="/models/mmproj.gguf", identity="file-m", size=gib(1))}
    found = on_disk("a", read_from="/hub/a/model.safetensors", companions=beside)
    calm.observed = replace(calm.observed, candidates={A: (found,)})  # type: ignore[dict-item]
    warm = calm.warm()
    assert warm is not None
    assert (warm.paths, warm.size) == (("/hub/a/model.safetensors", "/models/mmproj.gguf"), gib(5))
    assert warm.identity == "file-a|file-m"
