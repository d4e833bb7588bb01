"""Says at the end how many planner cycles the simulation has run under its properties, in all workers together."""

from __future__ import annotations

import sys

import pytest

_KEY = "planner_cycles_simulated"
_of_workers: list[int] = []


def _own() -> int:
    """Of this process; none where no test of the simulation was loaded."""
    return int(getattr(sys.modules.get("tests.sim.properties"), "cycles", 0))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """A worker has ended, and handed over its count."""
    _of_workers.append(getattr(node, "workeroutput", {}).get(_KEY, 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_KEY] = _own()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = _own() + sum(_of_workers)
    if total:
        terminalreporter.write_line(f"simulation: {total:,} planner cycles, each under every safety property")
