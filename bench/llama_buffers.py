"""The buffers that a real llama-server says it allocated: started with one model, read, and stopped."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.demo import find_server

_LINE = re.compile(r"(?P<buffer>\S+)\s+(?P<what>model|KV|RS|compute|output) buffer size =\s+(?P<size>[0-9.]+) MiB")
_LOADED = ("model loaded", "server is listening", "listening on")
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Reported:
    """MiB over all buffers."""

    weights: float
    cache: float
    compute: float
    output: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.compute + self.output


def measure(model: Path, flags: Sequence[str]) -> Reported:
    """Load `model` on the CPU and add up what the server reports. Raises RuntimeError with its last lines when it does not load."""
    server, env = find_server()
    argv = [
        str(server),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "-lv",
        "4",
        "--fit",
        "off",
        "--no-warmup",
        "--no-ui",
    ]
    argv += ["--device", "none", "-ngl", "0", "-t", "1", "--cache-ram", "0", *flags]
    settings = {**os.environ, **env, "GGML_NO_BACKTRACE": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(argv, env=settings, **pipes) as process:
        try:
            log = _read_until_loaded(process)
        finally:
            process.kill()
    sizes = dict.fromkeys(("model", "KV", "RS", "compute", "output"), 0.0)
    for match in _LINE.finditer(log):
        sizes[match["what"]] += float(match["size"])
    return Reported(sizes["model"], sizes["KV"] + sizes["RS"], sizes["compute"], sizes["output"])


def _read_until_loaded(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    deadline, log = time.monotonic() + _TIMEOUT_S, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not any(mark.encode() in log for mark in _LOADED):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise RuntimeError("llama-server did not load the model in time:\n" + _tail(log))
            piece = os.read(process.stdout.fileno(), 2**16)
            if not piece:
                raise RuntimeError("llama-server ended before the model was loaded:\n" + _tail(log))
            log += piece
    return log.decode(errors="replace")


def _tail(log: bytes) -> str:
    return "\n".join(log.decode(errors="replace").splitlines()[-8:])
