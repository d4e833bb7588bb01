"""What belongs to another user is taken away as that user: the daemon may be no more than somebody who can become it."""

from __future__ import annotations

import os
import pwd
import subprocess

from offloadd.accounts import Account, AccountError, find_account, step_to

_WITHIN_S = 30.0


def run_as(account: Account | None, *words: str) -> bool:
    """Run a small program as this account, as ourselves for None; whether it ended well. Blocks."""
    try:
        command = (*step_to(account), *words)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_WITHIN_S)
    except (AccountError, OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def run_as_owner(uid: int, *words: str) -> bool:
    """The same as whoever has this number; False, too, for one that we may not become. Blocks."""
    if uid == os.geteuid():
        return run_as(None, *words)
    try:
        return run_as(find_account(pwd.getpwuid(uid).pw_name), *words)
    except (KeyError, AccountError):
        return False
