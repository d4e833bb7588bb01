"""How a process ended that is not our child, where the kernel tells (Linux 6.15 and later) once its parent has asked for it."""

from __future__ import annotations

import fcntl
import os
import struct

from offloadd.state.launch import ExitStatus

_GET_INFO = 0xC040FF0B
"""PIDFD_GET_INFO with the first version of its struct: 64 bytes, the mask first and the exit code last."""
_EXIT = 1 << 3
_SIZE = 64


def told_status(pidfd: int) -> ExitStatus | None:
    """Its exit status; None while nobody has reaped it, or where the kernel does not tell."""
    info = bytearray(_SIZE)
    struct.pack_into("=Q", info, 0, _EXIT)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info, True)
    except OSError:
        return None
    (mask,) = struct.unpack_from("=Q", info, 0)
    if not mask & _EXIT:
        return None
    (status,) = struct.unpack_from("=i", info, _SIZE - 4)
    if os.WIFSIGNALED(status):
        return ExitStatus(signal=os.WTERMSIG(status))
    return ExitStatus(code=os.WEXITSTATUS(status))
