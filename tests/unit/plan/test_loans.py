"""Memory for people."""

from __future__ import annotations

from dataclasses import replace

from offloadd.plan.planner import plan
from offloadd.state.actions import GrantLoan, Plan
from offloadd.state.demand import Demand, Loan
from offloadd.state.desired import DesiredState, RunMode
from offloadd.state.ids import HOST_RAM
from offloadd.state.observed import InstanceView, ObservedState
from offloadd.units import Bytes, Instant
from tests.unit.plan.build import NOW, gib, offer, ram, spec, view

LOAN = Loan(id="l1", size=gib(8), since=Instant(NOW - 1), why="training")


def lend(loan: Loan, *views: InstanceView, used: float | None = None, **fields: object) -> Plan:
    """A machine of 16 GiB, of which 12.8 may be promised."""
    specs = {one.model: spec(one.model, **fields) for one in views}
    taken = sum(sum(one.measured.values()) for one in views) if used is None else gib(used)
    observed = ObservedState(
        instances={one.id: one for one in views},
        devices={HOST_RAM: ram(16 - taken / 2**30)},
        candidates={name: (offer(6),) for name in specs},
    )
    demand = Demand(loans={loan.id: loan}, last_used={name: Instant(NOW - 100) for name in specs})
    return plan(DesiredState(models=specs), observed, demand, now=NOW)


def kinds(answer: Plan) -> list[str]:
    return [type(action).__name__ for action in answer.actions]


def test_a_loan_that_fits_is_granted_at_once() -> None:
    answer = lend(LOAN)
    assert answer.actions == (GrantLoan(loan="l1", reserved={HOST_RAM: gib(8)}),)
    assert answer.loans == {"l1": "is given 8.0 GiB on host"}


def test_idle_models_leave_for_it_and_only_then_it_is_granted() -> None:
    answer = lend(LOAN, view("m-1", 6))
    assert kinds(answer) == ["StopInstance"]
    assert answer.loans == {"l1": "waits: needs 8.0 GiB on host, 6.8 GiB free; making room with m-1 (idle 1 min)"}


def test_a_model_that_is_to_run_always_leaves_too() -> None:
    assert kinds(lend(LOAN, view("m-1", 6), run=RunMode.ALWAYS)) == ["StopInstance"]


def test_a_pinned_one_does_not() -> None:
    answer = lend(LOAN, view("m-1", 6), pinned=True)
    assert answer.actions == ()
    assert answer.loans == {"l1": "waits: needs 8.0 GiB on host, 6.8 GiB free, and nothing may be evicted for it now"}


def test_nobody_leaves_for_what_can_never_be_lent() -> None:
    answer = lend(replace(LOAN, size=gib(14)), view("m-1", 6))
    assert answer.actions == ()
    assert answer.loans == {"l1": "cannot be had: it needs 14.0 GiB on host, more than its limit of 12.8 GiB"}


def test_nobody_leaves_when_it_would_not_be_enough() -> None:
    """Somebody else's program holds the rest."""
    assert lend(replace(LOAN, size=gib(12)), view("m-1", 6), used=11).actions == ()


def test_a_device_that_is_not_there_is_named() -> None:
    assert lend(replace(LOAN, device="1")).loans == {"l1": "waits: needs 8.0 GiB, and there is no device 1"}


def test_what_is_lent_stays_on_the_books() -> None:
    granted = replace(LOAN, granted={HOST_RAM: Bytes(gib(8))})
    answer = lend(granted)
    assert answer.loans == {"l1": "holds 8.0 GiB on host"}
    assert answer.accounts[HOST_RAM].lent == gib(8)


def test_ram_can_be_asked_for_by_name() -> None:
    assert lend(replace(LOAN, device="host")).loans == {"l1": "is given 8.0 GiB on host"}


def test_those_who_asked_first_are_served_first() -> None:
    first = replace(LOAN, since=Instant(NOW - 5))
    second = replace(LOAN, id="l2", since=Instant(NOW - 2))
    observed = ObservedState(devices={HOST_RAM: ram()})
    answer = plan(DesiredState(), observed, Demand(loans={"l2": second, "l1": first}), now=NOW)
    assert answer.actions == (GrantLoan(loan="l1", reserved={HOST_RAM: gib(8)}),)
    assert answer.loans["l2"] == "waits: needs 8.0 GiB on host, 4.8 GiB free, and nothing may be evicted for it now"


def test_while_gpus_cannot_be_read_a_loan_waits_and_is_told_so() -> None:
    observed = ObservedState(devices={HOST_RAM: ram()}, blind="the driver does not answer")
    answer = plan(DesiredState(), observed, Demand(loans={LOAN.id: LOAN}), now=NOW)
    assert answer.actions == ()
    assert answer.loans == {"l1": "waits: needs 8.0 GiB, and the driver does not answer"}
