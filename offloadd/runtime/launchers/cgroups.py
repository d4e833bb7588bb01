"""A control group for each instance, where this part of the tree is ours: nothing forked in it can leave it.

Only version 2 will do, and only where we may make groups below our own, as systemd's `Delegate=yes` allows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offloadd.units import Bytes

log = logging.getLogger(__name__)

USED = True
_SELF = Path("/proc/self")
_MAIN = "main"
"""systemd's usual name for the daemon's own group below a delegated one (`DelegateSubgroup=`), and ours."""
_NUMBER = re.compile(r"([0-9]{1,20})\n?")
_UNSAFE = re.compile(r"[^A-Za-z0-9._@-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEvidence:
    """What a group's books say after its processes have ended."""

    oom_kills: int = 0
    """Processes in it that the kernel killed for want of memory."""
    peak: Bytes | None = None
    """The most memory that it held; None where the controller is not ours."""


class Group:
    """One instance's group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Create it; OSError when that cannot be done."""
        self.path.mkdir(exist_ok=True)

    def kill(self) -> bool:
        """SIGKILL to every process in it, at once where the kernel offers that; whether there was any."""
        populated = self.populated
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            for pid in self._pids():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        return populated

    @property
    def populated(self) -> bool:
        """Whether a process lives in it."""
        return self._count("cgroup.events", "populated") > 0

    def pids(self) -> list[int]:
        """The processes in it."""
        return list(self._pids())

    def evidence(self) -> GroupEvidence:
        """What its books say."""
        peak = _NUMBER.fullmatch(self._read("memory.peak"))
        return GroupEvidence(
            oom_kills=self._count("memory.events", "oom_kill"),
            peak=Bytes(int(peak[1])) if peak else None,
        )

    def remove(self) -> None:
        """Take it away. One that is not empty yet stays, and the next daemon sweeps it."""
        with suppress(OSError):
            for below in self.path.iterdir():
                if below.is_dir():
                    Group(below).remove()
        with suppress(OSError):
            self.path.rmdir()

    def _pids(self) -> Iterator[int]:
        yield from map(int, filter(str.isdecimal, self._read("cgroup.procs").split()))

    def _count(self, name: str, key: str) -> int:
        found = re.search(rf"^{key} ([0-9]{{1,20}})$", self._read(name), re.MULTILINE)
        return int(found[1]) if found else 0

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(errors="replace")
        except OSError:
            return ""


class Groups:
    """The groups of one data folder's instances."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, mark: str) -> Group:
        """The group of the instance with this mark; it may not exist."""
        return Group(self._folder / _UNSAFE.sub("_", mark))

    def sweep(self, kept: AbstractSet[str]) -> int:
        """End the groups of all but these marks, and take away what is empty; how many had processes in them."""
        names = {self.of(mark).path.name for mark in kept}
        ended = 0
        for group in self._all():
            if group.path.name not in names:
                ended += group.kill()
                group.remove()
        return ended

    def remove(self) -> None:
        """Take the folder away, if nothing is in it."""
        with suppress(OSError):
            self._folder.rmdir()

    def _all(self) -> list[Group]:
        try:
            return [Group(entry) for entry in self._folder.iterdir() if entry.is_dir()]
        except OSError:
            return []


def delegated(home: Path) -> Groups | None:
    """Groups for the instances of this data folder; None where none may be made."""
    own = _own_folder() if USED else None
    if own is None:
        return None
    base = own.parent if own.name == _MAIN and os.access(own.parent / "cgroup.procs", os.W_OK) else own
    name = f"offloadd-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
    try:
        (base / name).mkdir(exist_ok=True)
        probe = base / name / "probe"
        probe.mkdir(exist_ok=True)
        writable = os.access(probe / "cgroup.procs", os.W_OK) and os.access(own / "cgroup.procs", os.W_OK)
        probe.rmdir()
    except OSError as error:
        log.debug("no control groups of our own below %s: %s", base, error)
        return None
    if not writable:
        with suppress(OSError):
            (base / name).rmdir()
        return None
    _count_memory(base, base / name)
    return Groups(base / name)


def _own_folder() -> Path | None:
    """Our group as a folder, where version 2 is mounted."""
    try:
        # Folders may have any name, and what cannot be read as text must be found all the same.
        entry = next(line for line in _text(_SELF / "cgroup").splitlines() if line.startswith("0::"))
        mounts = _text(_SELF / "mountinfo").splitlines()
    except (OSError, StopIteration):
        return None
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields = before.split()
        if after.startswith("cgroup2 ") and len(fields) > 4:
            root, point = fields[3:5]
            below = Path(entry.removeprefix("0::").lstrip("/"))
            if root != "/" and below.is_relative_to(root.lstrip("/")):
                below = below.relative_to(root.lstrip("/"))
            found = Path(point) / below
            try:
                return found if found.is_dir() else None
            except (OSError, ValueError):  # a folder above it is closed to us, or it is no name of a folder
                return None
    return None


def _text(path: Path) -> str:
    return path.read_text(errors="surrogateescape")


def _count_memory(base: Path, folder: Path) -> None:
    """Have the kernel keep books of the memory of each group, where it lets us. It is evidence, not a need."""
    try:
        if "memory" not in (base / "cgroup.controllers").read_text().split():
            return
        if "memory" not in (base / "cgroup.subtree_control").read_text().split():
            try:
                (base / "cgroup.subtree_control").write_text("+memory")
            except OSError:
                # Where controllers reach down, no process may stay in the middle: we move into a leaf of our own.
                (base / _MAIN).mkdir(exist_ok=True)
                (base / _MAIN / "cgroup.procs").write_text(str(os.getpid()))
                (base / "cgroup.subtree_control").write_text("+memory")
        (folder / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        log.debug("no books of memory below %s: %s", base, error)
