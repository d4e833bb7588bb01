"""A file system that takes questions and never answers: who asks it is in the kernel's hands, and no signal ends that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.table import Skipped

_INIT, _LOOKUP, _GETATTR = 26, 1, 3
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")


@dataclass
class HungDisk:
    """The mount, and whether somebody hangs in it."""

    path: Path
    _fd: int
    _hanging: threading.Event
    _open: bool = True

    def asked(self) -> bool:
        """Whether a process waits in it."""
        return self._hanging.is_set()

    def let_go(self) -> None:
        """Break the connection: whoever hangs gets an error."""
        if self._open:
            self._open = False
            _libc.umount2(str(self.path).encode(), 1 | 2)  # forced, and out of sight at once
            os.close(self._fd)


_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def hung_disk(folder: Path) -> Iterator[HungDisk]:
    """Mount one below `folder`."""
    path = folder / "disk"
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"hung", str(path).encode(), b"fuse", 0, options) != 0:
        os.close(fd)
        raise Skipped(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    disk = HungDisk(path, fd, threading.Event())
    thread = threading.Thread(target=_serve, args=(disk,), daemon=True)
    thread.start()
    try:
        yield disk
    finally:
        disk.let_go()
        thread.join(5)


def _serve(disk: HungDisk) -> None:
    """Say hello, describe the root, and read every other question without an answer."""
    with contextlib.suppress(OSError):
        while True:
            request = os.read(disk._fd, 1 << 17)
            _, opcode, unique, *_ = _IN.unpack_from(request)
            if opcode == _INIT:
                major, minor = struct.unpack_from("<II", request, _IN.size)
                body = struct.pack("<IIIIHHIIHH8I", major, min(minor, 31), 0, 0, 0, 0, 4096, 0, 0, 0, *[0] * 8)[:64]
                _answer(disk, unique, body.ljust(64, b"\0"))
            elif opcode == _GETATTR:
                attributes = struct.pack("<QQQQQQIIIIIIIIII", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)
                _answer(disk, unique, struct.pack("<QII", 1, 0, 0) + attributes)
            elif opcode == _LOOKUP:
                disk._hanging.set()


def _answer(disk: HungDisk, unique: int, body: bytes) -> None:
    os.write(disk._fd, _OUT.pack(_OUT.size + len(body), 0, unique) + body)
