"""The hold on a data folder: two daemons on one would stop each other's servers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offloadd.errors import PermanentError

_KEPT = "kept\n"


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Create the folder and hold it; PermanentError names the process that holds it already. The lock goes with the process."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "create it, make it writable for this user, or set storage.data_dir"
        raise PermanentError(f"cannot use the data folder {data_dir}: {error.strerror}", hint=hint) from None
    try:
        _take(lock, data_dir)
        yield
    finally:
        os.close(lock)


def leave_kept(data_dir: Path) -> None:
    """Note, while the folder is held, that its servers are left running on purpose."""
    (data_dir / "lock").write_text(_KEPT)


def was_kept(data_dir: Path) -> bool:
    """Whether the last daemon of the folder noted that, and no other has come since."""
    try:
        return (data_dir / "lock").read_text() == _KEPT
    except OSError:
        return False


def _take(lock: int, data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        message = f"another offloadd (pid {holder}) uses the data folder {data_dir}"
        raise PermanentError(message, hint="stop it, or set another storage.data_dir") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
