"""A folder of its own for each launch, where its TMPDIR points: killed, engines leave sockets and files there that nobody knows.

It lies in the data folder, which outlives the daemon (systemd's private /tmp does not), unless its path leaves no room for the
name of a socket or the engine's user may not go there. Everything here blocks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from offloadd.accounts import Account
from offloadd.runtime.launchers.owners import run_as, run_as_owner

log = logging.getLogger(__name__)

LONGEST = 107
"""Bytes of a UNIX socket's path."""
ROOM = 48
"""Of these, what is left for names in the folder: vLLM's sockets are named by 36 letters, Python's listeners take 32."""
_TMP = "tmp"
_THEIRS = "t"
"""The folder of another user, in one of ours."""
_NAME = re.compile(r"[0-9a-f]{12}")
_ENTERED, _MADE_IN = 0o711, 0o733


class Folders:
    """Those of the launches of one data folder."""

    def __init__(self, home: Path) -> None:
        self._bases = tuple(_bases(home.absolute()))

    def make(self, mark: str, account: Account | None) -> Path | None:
        """One for the launch with this mark, of that user and closed to others; None where none can be."""
        for base in self._bases:
            outer = base / _name(mark)
            path = outer if account is None else outer / _THEIRS
            if len(os.fsencode(path)) + 1 + ROOM > LONGEST:
                continue
            if _prepare(base) and (account is None or _may_enter(base, account)) and _make(outer, account):
                return path
        return None

    def remove(self, mark: str) -> None:
        """Take away what a launch had, with all that is in it: no process of it may be left."""
        for base in self._bases:
            _remove(base / _name(mark))

    def discard(self, folder: str) -> None:
        """The same by its path, as it was written down: its base may be another by now."""
        path = Path(folder)
        outer = path.parent if path.name == _THEIRS else path
        if _NAME.fullmatch(outer.name):
            _remove(outer)

    def sweep(self, kept: AbstractSet[str]) -> None:
        """Take away all but those of these marks."""
        names = {_name(mark) for mark in kept}
        for base in filter(_is_ours, self._bases):
            for outer in _below(base):
                if outer.name not in names:
                    _remove(outer)

    def close(self) -> None:
        """Take away where they were, if nothing is left there."""
        for base in filter(_is_ours, self._bases):
            with suppress(OSError):
                base.rmdir()


def _bases(home: Path) -> Iterator[Path]:
    """Where they may lie, the best first: where whoever runs us wants temporary files, if he says so."""
    ours = f"offloadd-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
    if os.environ.get("TMPDIR"):
        yield Path(os.environ["TMPDIR"]).absolute() / ours
    yield home / _TMP
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if runtime:
        yield Path(runtime) / _TMP
    yield Path("/tmp") / ours  # noqa: S108  # nosec B108  (used only if it is ours)


def _name(mark: str) -> str:
    """Nobody can foresee it, since nobody can foresee the mark."""
    return hashlib.sha256(mark.encode()).hexdigest()[:12]


def _prepare(base: Path) -> bool:
    """Whether it is a folder of ours, made if need be. Whoever is not us can go through it and see nothing."""
    with suppress(OSError):
        base.mkdir(mode=_ENTERED, exist_ok=True)
        if _is_ours(base):
            base.chmod(_ENTERED)
            return True
    return False


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _may_enter(base: Path, account: Account) -> bool:
    """Whether that user can go all the way down to it."""
    return all(_may_pass(folder, account) for folder in (base, *base.parents))


def _may_pass(folder: Path, account: Account) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    if found.st_uid == account.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    return bool(found.st_mode & (stat.S_IXGRP if found.st_gid in account.groups else stat.S_IXOTH))


def _make(outer: Path, account: Account | None) -> bool:
    """It may lie there already only if the mark is not random, which it is."""
    try:
        outer.mkdir(mode=0o700)
    except OSError as error:
        log.debug("no folder for a launch: %s", error)
        return False
    if account is None:
        return True
    # Only root could give it away, so that user makes it: for a moment everybody could, who knew its name.
    outer.chmod(_MADE_IN)
    made = run_as(account, "mkdir", "-m", "700", str(outer / _THEIRS))
    outer.chmod(_ENTERED)
    if not made:
        _remove(outer)
    return made


def _below(base: Path) -> list[Path]:
    try:
        return [path for path in base.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return []


def _remove(outer: Path) -> None:
    if not _is_ours(outer):
        return
    theirs = outer / _THEIRS
    with suppress(OSError):
        owner = theirs.lstat().st_uid
        if owner != os.geteuid():
            run_as_owner(owner, "rm", "-rf", "--", str(theirs))  # all that is in it; itself it lies in our folder
            theirs.rmdir()
    try:
        shutil.rmtree(outer)
    except OSError as error:
        log.warning("what a server has left in %s cannot be taken away: %s", outer, error)
