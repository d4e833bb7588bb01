"""Pieces of shared memory that engines leave in /dev/shm when they are killed: RAM that is used by nobody until the next boot.

There is no folder of one's own for these. A piece is taken away only if all of this holds: a process of the tree was seen to have
it mapped, it belongs to that process's user and is closed to others, its name is one of those that libraries make up by chance, it
is still the same file, and no process that can be seen has it mapped or open now. Everything here blocks.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from offloadd.runtime.launchers.identity import all_pids
from offloadd.runtime.launchers.owners import run_as_owner
from offloadd.state.life import SharedPiece

FOLDER = Path("/dev/shm")  # noqa: S108  # nosec B108
MOST = 512
"""Pieces that are remembered of one launch: a bound, far from what any was seen to have."""
_NAMES = "|".join(
    (
        r"psm_[0-9a-f]{8}",  # Python's shared_memory: vLLM's queues between its processes, 160 and 240 MiB each
        r"sem\.mp-[a-z0-9_]{8}",  # Python's multiprocessing
        r"torch_\d+_\d+_\d+",
        r"nccl-[A-Za-z0-9]{6}",
        r"cuda\.shm\.[0-9a-f.]+",
        r"vllm_(?:offload|ec)_[\w.-]+\.mmap",  # vLLM's caches of its KV blocks in RAM
    )
)
_MAPPED = re.compile(rf"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +{FOLDER}/({_NAMES})$".encode(), re.MULTILINE)


def mapped(pids: Iterable[int]) -> set[SharedPiece]:
    """Pieces that these processes have mapped, and that are their user's alone."""
    found: set[SharedPiece] = set()
    for pid in pids:
        with suppress(OSError):
            owner = os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116  (a Path for each process would cost more than the reading)
            found |= {piece for piece in _maps(pid) if _owner(piece) == owner}
    return found


def still_there(pieces: Iterable[SharedPiece]) -> set[SharedPiece]:
    """Those that lie there still, each the same file."""
    return {piece for piece in pieces if _owner(piece) is not None}


def remove(pieces: Iterable[SharedPiece]) -> int:
    """Take away what nobody uses any more; how many that were."""
    left = still_there(pieces)
    if left:
        left -= _in_use()
    return sum(_unlink(piece) for piece in left)


def _maps(pid: int) -> set[SharedPiece]:
    with open(f"/proc/{pid}/maps", "rb") as file:  # noqa: PTH123
        text = file.read()
    if b"/shm/" not in text:
        return set()
    return {
        SharedPiece(name=name.decode(), device=os.makedev(int(major, 16), int(minor, 16)), inode=int(inode))
        for major, minor, inode, name in _MAPPED.findall(text)
    }


def _owner(piece: SharedPiece) -> int | None:
    """Whose it is; None when it is gone, another by now, or open to others than him."""
    try:
        found = (FOLDER / piece.name).lstat()
    except OSError:
        return None
    same = stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == (piece.device, piece.inode)
    return found.st_uid if same and not found.st_mode & 0o077 else None


def _in_use() -> set[SharedPiece]:
    """What any process has mapped or open. One that we may not look into is another user's, for whom these are closed."""
    used: set[SharedPiece] = set()
    for pid in (*all_pids(), os.getpid()):
        with suppress(OSError):
            used |= _maps(pid)
        with suppress(OSError):
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    used |= _opened(descriptor)
    return used


def _opened(descriptor: os.DirEntry[str]) -> set[SharedPiece]:
    path = os.readlink(descriptor.path)  # noqa: PTH115
    if not path.startswith(f"{FOLDER}/"):
        return set()
    found = descriptor.stat()
    return {SharedPiece(name=path.rpartition("/")[2], device=found.st_dev, inode=found.st_ino)}


def _unlink(piece: SharedPiece) -> bool:
    path = FOLDER / piece.name
    owner = _owner(piece)
    if owner is None:
        return False
    if owner != os.geteuid():
        return run_as_owner(owner, "rm", "-f", "--", str(path))
    with suppress(OSError):
        path.unlink()
        return True
    return False
