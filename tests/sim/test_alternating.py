"""200 requests for two models in turn, five a second, where only one of them fits: swaps and waits, against a plain line."""

from __future__ import annotations

import pytest

from offloadd.plan.room import FAIR_WAIT, LONGEST_STAY
from tests.sim.alternating import EVERY, REQUESTS, RUNS_FOR, SLOTS, first_come_first_served, with_plans

END_AND_RELEASE = 0.5 + 0.3 + 0.5
"""TERM, release, and the planner's own steps."""


@pytest.mark.parametrize("load", [1.0, 4.0, 10.0])
def test_alternating_requests_do_not_swap_at_each_of_them(load: float) -> None:
    ours, plain = with_plans(load), first_come_first_served(load)
    print(f"load of {load:g} s\n  planned:                     {ours}\n  first come, first served:    {plain}")
    assert ours.served == plain.served == REQUESTS
    assert plain.swaps > REQUESTS * 0.9
    assert ours.swaps <= plain.swaps / 5
    assert ours.mean < plain.mean / 3
    # The other's load and stay, or the fair wait; what then runs; the end; its own load.
    turn = max(load + min(LONGEST_STAY, load), FAIR_WAIT) + RUNS_FOR + END_AND_RELEASE + load
    # Then those that came before it, and before the turn those of the other that came before it.
    batch = turn * (1 / EVERY / 2) / (SLOTS / RUNS_FOR)
    assert ours.longest <= turn + 2 * batch
