"""What vLLM makes where every process makes its own, and leaves there when it is killed: sockets, and shared memory."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import tempfile
import uuid

from llama_process import Marks

_KEPT: list[object] = []
_SIZE = 1 << 20


def make(marks: Marks) -> None:
    """A socket of ZeroMQ's, by the rule of vLLM, a queue of Python's shared_memory, and a semaphore of its multiprocessing."""
    base = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    listener = socket.socket(socket.AF_UNIX)
    path = f"{base}/{uuid.uuid4()}"
    listener.bind(path)
    marks.write(f"made {path}")
    listener_of_python = tempfile.mkdtemp(prefix="pymp-")
    marks.write(f"made {listener_of_python}")
    _KEPT.append(listener)
    for name, size in ((f"psm_{secrets.token_hex(4)}", _SIZE), (f"sem.mp-{secrets.token_hex(4)}", 32)):
        path = f"/dev/shm/{name}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(descriptor, size)
        _KEPT.append(mmap.mmap(descriptor, size))
        os.close(descriptor)
        marks.write(f"made {path}")
