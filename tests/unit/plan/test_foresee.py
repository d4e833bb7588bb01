"""Where a config leads: carried out in thought, on a machine on which all goes well."""

from __future__ import annotations

from dataclasses import replace

from offloadd.plan.foresee import Foresight, foresee
from offloadd.state.demand import Demand, Waiting
from offloadd.state.desired import DesiredState, ModelSpec, RunMode
from offloadd.state.ids import HOST_RAM, ModelName
from offloadd.state.observed import InstanceState, InstanceView, ObservedState
from offloadd.units import Instant
from tests.unit.plan.build import NOW, gib, offer, ram, spec, view

ALWAYS = RunMode.ALWAYS


def ahead(*specs: ModelSpec, views: tuple[InstanceView, ...] = (), size: float = 4.0, demand: Demand | None = None) -> Foresight:
    used = sum(sum(one.measured.values()) for one in views) / 2**30
    observed = ObservedState(
        instances={one.id: one for one in views},
        devices={HOST_RAM: ram(16 - used)},
        launches={one.id.model: one.id.number for one in views},
        candidates={one.name: (offer(size, fingerprint=" ".join(one.args) or "now"),) for one in specs},
    )
    return foresee(DesiredState(models={one.name: one for one in specs}), observed, demand or Demand(), now=NOW)


def said(found: Foresight) -> list[str]:
    return [f"{type(action).__name__.removesuffix('Instance').lower()} {action.instance}" for action in found.actions]  # type: ignore[union-attr]


def test_what_fits_starts_and_the_books_say_so() -> None:
    found = ahead(spec("a", run=ALWAYS), spec("b", run=ALWAYS))
    assert said(found) == ["start a-1", "start b-1"]
    assert found.settled
    assert (found.before[HOST_RAM].reserved, found.last.accounts[HOST_RAM].reserved) == (0, gib(8))


def test_a_settled_machine_has_nothing_ahead() -> None:
    assert said(ahead(spec("a", run=ALWAYS), views=(view("a-1", 4),))) == []


def test_a_changed_one_is_replaced_beside_where_there_is_room_and_after_where_there_is_not() -> None:
    changed = spec("a", run=ALWAYS, args=("--new",))
    assert said(ahead(changed, views=(view("a-1", 4),))) == ["start a-2", "stop a-1"]
    assert said(ahead(changed, views=(view("a-1", 9),), size=9)) == ["stop a-1", "start a-2"]


def test_others_are_evicted_for_one_of_higher_priority_and_stay_out() -> None:
    first, low = spec("a", run=ALWAYS, priority=90), spec("b", run=ALWAYS, priority=10)
    found = ahead(first, low, views=(view("b-1", 9, spec=low),), size=9)
    assert said(found) == ["stop b-1", "start a-1"]
    assert found.last.decisions[ModelName("b")].state == "waiting"


def test_a_busy_one_is_drained_when_the_fair_wait_is_over() -> None:
    low, high = spec("b", priority=10), spec("a", priority=90)
    busy = view("b-1", 9, spec=low)
    demand = Demand(waiting={ModelName("a"): Waiting(count=1, oldest=Instant(NOW - 1))}, leases={busy.id: 2})
    found = ahead(high, low, views=(busy,), size=9, demand=demand)
    assert said(found) == ["drain b-1", "start a-1"]


def test_what_is_loading_counts_as_loaded_and_what_ends_as_gone() -> None:
    loading = replace(view("a-1", 4, InstanceState.LOADING), measured={HOST_RAM: gib(1)})
    found = ahead(spec("a", run=ALWAYS), views=(loading, view("b-3", 4, InstanceState.STOPPING)))
    assert said(found) == []
    assert found.last.accounts[HOST_RAM].reserved >= gib(4)


def test_of_two_that_must_run_where_one_fits_one_waits() -> None:
    specs = [spec(name, run=ALWAYS) for name in ("a", "b")]
    found = ahead(*specs, size=9)
    assert said(found) == ["start a-1"]
    assert found.settled
