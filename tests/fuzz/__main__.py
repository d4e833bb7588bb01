"""`make fuzz`: the table of parsers, each tried as often as is asked for; what was done is printed row by row."""

from __future__ import annotations

import argparse
import sys
import traceback

from tests.fuzz.table import parsers, tried


def main() -> int:
    asked = argparse.ArgumentParser(prog="make fuzz")
    asked.add_argument("--runs", type=int, help="of each parser; default: as in `make test`, or as many as the seconds allow")
    asked.add_argument("--seconds", type=float, help="of processor time for each parser, after which the next has its turn")
    asked.add_argument("--seed", type=int, default=0, help="number of the first run; runs of one number are alike")
    asked.add_argument("--only", default="", help="part of a parser's name")
    given = asked.parse_args()
    failed = total = 0
    for parser in parsers():
        if given.only not in parser.name:
            continue
        left = given.runs or (sys.maxsize if given.seconds else parser.runs)
        done, spent = 0, 0.0
        try:
            while left > 0 and (given.seconds is None or spent < given.seconds):
                some = min(left, 200)
                spent += tried(parser, some, given.seed + done)
                left, done = left - some, done + some
        except Exception:
            failed += 1
            print(f"{parser.name}: FAILED\n{traceback.format_exc()}", flush=True)
        else:
            print(f"{parser.name}: {done} runs in {spent:.1f} s: {parser.property}", flush=True)
        total += done
    print(f"{total} runs, {failed} parsers failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
