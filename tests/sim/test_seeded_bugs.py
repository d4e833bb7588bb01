"""The properties are worth something: each of these deliberate faults of the planner is caught by the property it breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from offloadd.plan import accounting, draft, room, settle
from offloadd.plan.eviction import Evictable, Relief, choose_victims
from offloadd.plan.restart import next_restart
from tests.sim import properties
from tests.sim import test_planner_sim as sim
from tests.sim.drive import Driver
from tests.sim.properties import Broken
from tests.sim.world import Impossible


def leaving_memory_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    real = accounting._add
    monkeypatch.setattr(accounting, "_add", lambda *books, leaving=False, **rest: None if leaving else real(*books, **rest))


def free_memory_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    real = accounting._Sums.account
    blind = lambda sums, device, limit: real(sums, replace(device, free=device.total), limit)  # noqa: E731
    monkeypatch.setattr(accounting._Sums, "account", blind)


def busy_instances_are_stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft.Draft, "retire", lambda self, view, reason, why: self.stop(view, reason, why))


def restarts_never_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(policy: object, exits: object, *, now: float) -> object:
        return replace(next_restart(policy, exits, now=now), at=now)  # type: ignore[arg-type]

    monkeypatch.setattr(settle, "next_restart", at_once)


def permanent_failures_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    def mild(policy: object, exits: tuple, *, now: float) -> object:  # type: ignore[type-arg]
        return next_restart(policy, [replace(e, cause=replace(e.cause, permanent=False)) for e in exits], now=now)  # type: ignore[arg-type]

    monkeypatch.setattr(settle, "next_restart", mild)


def freed_room_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    real = room.make_room

    def no_hold(made: draft.Draft, *rest: object) -> object:
        before = dict(made.ledger.room)
        answer = real(made, *rest)  # type: ignore[arg-type]
        made.ledger.room = before
        return answer

    monkeypatch.setattr(settle, "make_room", no_hold)


def pins_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_may_leave", lambda made, spec, want: spec.name != want.spec.name)


def surplus_is_counted_without_knowing_what_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_is_known", lambda made, spec, view: True)


def everyone_may_evict(monkeypatch: pytest.MonkeyPatch) -> None:
    real = room.for_model
    monkeypatch.setattr(settle, "for_model", lambda made, want: real(made, replace(want, urgent=True)))


def wakes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft.Draft, "wake", lambda self, at: None)


def victims_are_taken_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(attempt: object, there: object, candidates: Sequence[Evictable], devices: object) -> Relief | None:
        answer = choose_victims(attempt, there, candidates, devices)  # type: ignore[arg-type]
        return answer and Relief(tuple(candidates[:1]), answer.placement)

    monkeypatch.setattr(room, "choose_victims", first)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    leaving_memory_counts_as_free: "reserved_memory_stays_within_each_devices_limit_releasing_included",
    free_memory_is_not_looked_at: "a_start_never_takes_memory_that_others_use_or_were_promised",
    busy_instances_are_stopped_at_once: "an_instance_that_holds_leases_is_not_stopped_before_its_drain_deadline",
    restarts_never_back_off: "a_model_that_keeps_failing_backs_off_and_is_given_up",
    permanent_failures_are_retried: "a_permanently_broken_model_is_not_started_again",
    freed_room_is_not_held: "room_on_its_way_is_kept_for_the_first_in_line",
    pins_are_ignored: "a_pinned_instance_or_one_of_higher_priority_is_never_evicted",
    surplus_is_counted_without_knowing_what_is_stale: "a_missing_observation_never_causes_a_stop",
    everyone_may_evict: "a_pinned_instance_or_one_of_higher_priority_is_never_evicted",
    wakes_are_forgotten: "nothing_changes_before_the_plan_wakes",
    victims_are_taken_as_they_come: "the_same_inputs_in_any_order_give_the_same_plan",
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planner_with_this_bug_is_caught(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    caught: set[str] = set()
    for seed in range(60):
        try:
            Driver(seed).run(300, replan_every=4, calm_every=150)
        except Broken as found:
            caught.add(found.name)
        except (Impossible, KeyError) as found:
            caught.add(str(found))
        if BUGS[bug] in caught:
            return
    pytest.fail(f"not caught as {BUGS[bug]}; caught as {caught or 'nothing'}")


def test_without_the_hold_a_large_model_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    freed_room_is_not_held(monkeypatch)
    monkeypatch.setattr(properties, "STEP", ())  # this is about where the run ends
    asked = sim.serve_large_under_pressure(sim.world_of(("a", 5.0, {}), ("b", 5.0, {}), ("large", 10.0, {})))
    assert asked.granted_at is None or asked.granted_at - asked.arrived > 30
