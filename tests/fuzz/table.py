"""Every parser of bytes that come from outside, what must be true of it whatever they are, and how often that is tried.

The properties that all have in common: only the documented error, an answer within a second of processor time, and no more memory
than a few copies of the input.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

SECOND = 1.0
"""Of processor time, for one input."""
MIB = 2**20
SAMPLED = 25
"""Memory is watched in one run of so many: watching takes longer than what is watched."""


@dataclass(frozen=True, slots=True)
class Parser:
    """One row. `run` makes one input from the dice, gives it to the parser, and asserts what must be true."""

    name: str
    property: str
    run: Callable[[Random], None]
    runs: int
    """In `make test`; `make fuzz` multiplies."""
    memory: int = 32 * MIB


def tried(parser: Parser, runs: int, first: int = 0) -> float:
    """Run it so often; seconds of processor time. What fails says with which seed: `make fuzz ARGS='--only NAME --seed N'`."""
    began = time.process_time()
    for number in range(first, first + runs):
        _once(parser, number)
    return time.process_time() - began


def _once(parser: Parser, number: int) -> None:
    rng = Random(f"{parser.name} {number}")
    watched = number % SAMPLED == 0
    if watched:
        tracemalloc.start()
    began = time.thread_time()
    try:
        parser.run(rng)
        spent = time.thread_time() - began
        peak = tracemalloc.get_traced_memory()[1] if watched else 0
    except BaseException as error:
        error.add_note(f"make fuzz ARGS='--only \"{parser.name}\" --seed {number} --runs 1'")
        raise
    finally:
        if watched:
            tracemalloc.stop()
    assert watched or spent < SECOND, f"{parser.name}, seed {number}: {spent:.2f} s"
    assert peak < parser.memory, f"{parser.name}, seed {number}: {peak / MIB:.1f} MiB"


def parsers() -> Iterator[Parser]:
    """All of them."""
    from tests.fuzz import of_config, of_engines, of_files, of_requests

    for module in (of_files, of_config, of_requests, of_engines):
        yield from module.PARSERS
