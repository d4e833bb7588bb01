"""`make soak`: the house for as long as `--seconds` says, with figures at the end. Exit 1 when something does not add up."""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.soak.soak import check, soak


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    asked = parser.parse_args()
    print(f"seed {asked.seed}, {asked.seconds:g} s")
    with tempfile.TemporaryDirectory(prefix="offloadd-soak-") as folder:
        figures = soak(Path(folder), asked.seconds, asked.seed)
    print("\n".join(figures.lines()))
    check(figures)


main()
