"""Heaps of the C library: few, however many threads ask it for memory, and none that keeps large pieces."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """\
import ctypes, sys, threading
from offloadd import allocator
if sys.argv[1] == "settled":
    allocator.settle()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
large = 8 * 2**20
libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(large))))  # after which glibc keeps such pieces
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
meet = threading.Barrier(12)
def work():
    meet.wait()
    held = [libc.malloc(ctypes.c_size_t(2000)) for _ in range(100)]
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
for each in threads:
    each.start()
for each in threads:
    each.join()
before = resident()
large_pieces = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**20))) for _ in range(40)]
for piece in large_pieces:
    ctypes.memset(piece, 1, 2**20)
small = libc.malloc(ctypes.c_size_t(100_000))
for piece in large_pieces:
    libc.free(piece)
print((resident() - before) // 2**20, flush=True)
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is not glibc")


def heaps(how: str) -> tuple[int, int]:
    """How many heaps there are after twelve threads, and how many MiB stay of forty after they were given back."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    kept, _, told = done.stdout.partition("\n")
    return told.count("<heap nr="), int(kept)


@glibc
def test_few_heaps_and_none_that_keeps_large_pieces() -> None:
    count, kept = heaps("settled")
    assert count <= 2
    assert kept <= 2


@glibc
def test_left_alone_it_keeps_both() -> None:
    """Else there were nothing to settle."""
    count, kept = heaps("alone")
    assert count > 2
    assert kept > 20
