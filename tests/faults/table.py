"""What a fault is, how one is run, and the table that comes of many."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.servers import until
from tests.e2e.conftest import Real
from tests.integration.daemon import Daemon

RECOVERS_WITHIN_S = 30.0


class Skipped(Exception):
    """The fault cannot be injected on this machine; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of it: what a client saw, and seconds until a request was answered again (None where it never stopped)."""

    client: str
    recovery_s: float | None = None


@dataclass(frozen=True)
class Fault:
    """One row: the number of the fault in the project's list (0 where it is not in it), what is injected, and how."""

    number: int
    what: str
    inject: Callable[[Place], Outcome]
    real: bool
    """Whether the engine is the real llama-server."""


@dataclass(frozen=True)
class Place:
    """Where a fault is injected."""

    folder: Path
    real: Real | None

    def real_one(self) -> Real:
        """The real engine and model."""
        if self.real is None:
            raise Skipped("no real llama-server here")
        return self.real


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    fault: Fault
    outcome: Outcome | None
    trouble: str = ""
    skipped: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """Number, what was injected, the engine, what a client saw, time to recovery, verdict."""
        recovery = "" if self.outcome is None else _seconds(self.outcome.recovery_s)
        verdict = "skipped" if self.skipped else "as it should" if self.outcome else "FAILED"
        saw = self.outcome.client if self.outcome else self.trouble.strip().splitlines()[-1]
        engine = "llama-server" if self.fault.real else "stand-in"
        return (str(self.fault.number or "+"), self.fault.what, engine, saw, recovery, verdict)


FAULTS: list[Fault] = []


def fault(number: int, what: str, *, real: bool = False) -> Callable[[Callable[[Place], Outcome]], Callable[[Place], Outcome]]:
    """Enter a function into the table."""

    def enter(inject: Callable[[Place], Outcome]) -> Callable[[Place], Outcome]:
        FAULTS.append(Fault(number, what, inject, real))
        return inject

    return enter


def run_all(faults: Sequence[Fault], real: Real | None, jobs: int, said: Callable[[Result], None]) -> list[Result]:
    """Run them, some at a time; results in the order of the faults."""

    def one(each: Fault) -> Result:
        result = _run(each, real)
        said(result)
        return result

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, faults))


def markdown(results: Sequence[Result]) -> str:
    """The table for the documentation."""
    head = ("#", "injected", "engine", "what a client saw", "well again after", "verdict")
    rows = [head, ("---",) * len(head), *(result.cells for result in results)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows) + "\n"


def answers_again(daemon: Daemon, since: float, name: str = "a", within_s: float = RECOVERS_WITHIN_S) -> float:
    """Seconds from `since` until a request is answered, asking all the time."""

    def answered() -> bool:
        try:
            return daemon.chat(name, 1).status == 200
        except OSError:
            return False

    until(answered, f"{name} answers again", within_s)
    return time.monotonic() - since


def _run(each: Fault, real: Real | None) -> Result:
    with tempfile.TemporaryDirectory(prefix=f"fault-{each.number}-") as folder:
        try:
            return Result(each, each.inject(Place(Path(folder), real)))
        except Skipped as why:
            return Result(each, None, str(why), skipped=True)
        except BaseException:
            return Result(each, None, traceback.format_exc())


def _seconds(value: float | None) -> str:
    return "no break" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def is_root() -> bool:
    """Whether mounts may be made."""
    return os.geteuid() == 0
