"""How the C library keeps memory that it was given back: a daemon that runs for months is no larger than it needs to be."""

from __future__ import annotations

import ctypes

ARENAS = 2
"""glibc gives each thread a heap of its own, up to eight for each processor, and each of them keeps what its threads once needed at
most. But our threads take turns, since only one of them runs Python at a time."""
LARGE = 256 * 1024
"""Bytes from which a piece of memory is the kernel's again as soon as it is given back. glibc raises this by itself with the first
large body that comes, and from then on keeps bodies among small things, in holes that fit nothing later."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def settle() -> None:
    """To be called before there are threads. Other C libraries than glibc are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)
        mallopt(_M_MMAP_THRESHOLD, LARGE)
