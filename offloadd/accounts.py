"""Users that engines run as, and the step by which a process becomes one: of what the daemon may do, nothing passes through it.

The step is util-linux's `setpriv`, a program of its own: code of ours between fork and exec would run beside our threads.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SETPRIV = "setpriv"
_GPU_GROUPS = ("video", "render")
"""What the machine's GPUs belong to."""
_NEEDED = {"CAP_DAC_READ_SEARCH": 2, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SYS_PTRACE": 19}
"""Capabilities, by their bits: to become another user, to end its processes, and to see in /proc which of them are ours and
what they listen on."""


class AccountError(Exception):
    """An engine cannot be run as it should, and so is not run at all. `message` is a sentence for an operator."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One user of the machine as an engine runs: its numbers, its groups with those that open GPUs, and its home."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def environment(self) -> dict[str, str]:
        """What says who it is."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def find_account(user: str, group: str = "") -> Account | None:
    """The account that these names stand for, if we may change to it: AccountError when not. None for no user. Blocks."""
    if not user:
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise AccountError(f'there is no user "{user}" on this machine', "create it, or name another in user") from None
    gid = _gid(group) if group else entry.pw_gid
    if entry.pw_uid == 0:
        raise AccountError(f'the user "{user}" is root, which may do more than the daemon', "name a user without rights of its own")
    if entry.pw_uid == os.geteuid():
        hint = "name another user, or leave user out"
        raise AccountError(f'the user "{user}" is the one that the daemon runs as, so nothing would be kept apart', hint)
    lacking = sorted(name for name, bit in _NEEDED.items() if not _passed_on() >> bit & 1)
    if lacking:
        hint = "run the daemon as root, or give it these capabilities: systemd/drop-ins/engine-users.conf"
        raise AccountError(f'the daemon may not change to the user "{user}": it lacks {", ".join(lacking)}', hint)
    groups = {*os.getgrouplist(user, gid), *_gpu_groups()}
    return Account(name=user, uid=entry.pw_uid, gid=gid, groups=tuple(sorted(groups)), home=entry.pw_dir)


def step_to(account: Account | None) -> tuple[str, ...]:
    """Words that stand before an engine's command line, so that it runs as this account, and as ourselves for None.

    In either case it keeps no capability that we were given to pass on. AccountError when there is no way to do that.
    """
    if account is None and not _capabilities("CapAmb"):
        return ()
    program = shutil.which(_SETPRIV)
    if program is None:
        raise AccountError(f"{_SETPRIV} is not on PATH, by which engines lose the daemon's rights", "install util-linux")
    words: tuple[str, ...] = (program, "--inh-caps=-all", "--ambient-caps=-all")
    if account is not None:
        groups = ",".join(map(str, account.groups))
        words += (f"--reuid={account.uid}", f"--regid={account.gid}", f"--groups={groups}", "--no-new-privs")
    return (*words, "--")


def trouble_with(user: str, group: str) -> tuple[str, str] | None:
    """Why an engine cannot run as this user, and what to do; None when it can. Blocks."""
    try:
        step_to(find_account(user, group))
    except AccountError as error:
        return error.message, error.hint
    return None


def _gid(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise AccountError(f'there is no group "{group}" on this machine', "create it, or name another in group") from None


def _gpu_groups() -> set[int]:
    found = set()
    for name in _GPU_GROUPS:
        with suppress(KeyError):
            found.add(grp.getgrnam(name).gr_gid)
    return found


def _passed_on() -> int:
    """Capabilities that a program has which we start: root's are its own, another user's are those it was given to pass on."""
    return _capabilities("CapEff" if os.geteuid() == 0 else "CapAmb")


def _capabilities(name: str) -> int:
    """One of our sets of capabilities, as bits; none where the kernel does not tell."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.partition(":")[2], 16)
    return 0
