"""`make faults`: run them all, print the table, and with `--write` keep it in docs/faults.md. Exit 1 if one ends as it should not.

python -m tests.faults [--write] [--jobs N] [WORD …]      only those whose number or text has one of the words
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import sys
import time
from pathlib import Path

from offloadd import demo
from offloadd.errors import PermanentError
from tests.e2e.conftest import Real
from tests.faults import cards, daemons, engines  # noqa: F401  (they enter their rows)
from tests.faults.table import FAULTS, Fault, Result, markdown, run_all

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
_HEAD = """\
# Faults, and what a client sees of them

Each row is a fault injected into a real daemon with real processes by `make faults`, which writes this page: what a client saw,
and how long it took until requests were answered again. Rows with `llama-server` run the real one with a real model; the
stand-in of the tests can be told to misbehave in ways that the real one only does on bad days. A row that ends otherwise than it
should makes the command fail. Times include a start of the server where one was needed (the stand-in takes about 0.4 s on an
idle core, more where others compute too), and of the daemon where it was killed (about 1 s). Where the limits of silence are
shortened, the row says so.

"""


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="make faults")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    chosen = [each for each in sorted(FAULTS, key=lambda each: each.number) if _wanted(each, options.words)]
    begin = time.monotonic()
    quiet = io.StringIO()  # what the daemons' logs hold is in the report of a row that failed
    with contextlib.redirect_stdout(quiet):
        results = run_all(chosen, _real(), options.jobs, _say)
    table = markdown(results)
    print(table)
    failed = [result for result in results if not result.outcome and not result.skipped]
    took = f"{len(results)} faults in {time.monotonic() - begin:.0f} s, {len(failed)} not as they should"
    print(took)
    for result in failed:
        print(f"\n--- {result.fault.number} {result.fault.what}\n{result.trouble}", file=sys.stderr)
    if options.write and not failed:
        PAGE.write_text(f"{_HEAD}{table}\n{_where(took)}\n")
    return 1 if failed else 0


def _wanted(each: Fault, words: list[str]) -> bool:
    return not words or any(word == str(each.number) or word in each.what for word in words)


def _real() -> Real | None:
    try:
        command, env = demo.find_server()
        return Real({"command": [str(command)], "env": env}, demo.find_model())
    except PermanentError:
        return None


def _say(result: Result) -> None:
    print(" · ".join(result.cells), file=sys.stderr, flush=True)


def _where(took: str) -> str:
    return f"{took}; {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}."


if __name__ == "__main__":
    sys.exit(main())
