"""What the two commands share: exit codes and options."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from offloadd import __version__
from offloadd.errors import OffloaddError

FAILED = 1
"""A failure that was foreseen: a bad config, a refusal, no daemon. Wrong usage is 2."""
BUG = 3

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def run_app(application: Callable[[], object]) -> None:
    """Call a Typer application and turn what it raises into the exit codes of the contract."""
    try:
        application()
    except OffloaddError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # noqa: BLE001  (the last line of defence, and it tells all)
        traceback.print_exc()
        print(f"This is a bug in offloadd {__version__}.", file=sys.stderr)
        sys.exit(BUG)
