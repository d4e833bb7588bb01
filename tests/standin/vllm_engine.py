"""The engine's processes of the vLLM stand-in: they load, hold memory, and outlive an API server that is killed."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import vllm_leavings
from llama_process import Knobs, Marks, hold_on_gpus, leave
from vllm_flags import Options

_STEPS = 4
_MIB = 2**20


@dataclass(slots=True)
class Engine:
    """The EngineCore as the API server sees it: a pid, and a pipe to the Worker below it."""

    pid: int
    orders: int

    def order(self, text: str) -> None:
        """`sleep` or `wake`."""
        os.write(self.orders, f"{text}\n".encode())

    @property
    def ended(self) -> bool:
        return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid


def start_engine(options: Options, knobs: Knobs) -> Engine | None:
    """Fork EngineCore and Worker and wait until they have loaded; None when they fail, with the cause in the log."""
    ready_r, ready_w = os.pipe()
    orders_r, orders_w = os.pipe()
    pid = _fork(lambda: _engine_core(options, knobs, ready_w, orders_r))
    os.close(ready_w)
    os.close(orders_r)
    said = os.read(ready_r, 16)
    os.close(ready_r)
    if said == b"ready":
        return Engine(pid, orders_w)
    os.waitpid(pid, 0)
    return None


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        work()
    finally:
        os._exit(1)


def _say(text: str, part: str) -> None:
    stamp = time.strftime("%m-%d %H:%M:%S")
    os.write(1, f"({part} pid={os.getpid()}) INFO {stamp} [standin.py:1] {text}\n".encode())


def _engine_core(options: Options, knobs: Knobs, ready: int, orders: int) -> None:
    """Lives until it is killed, or its Worker has ended. A parent that dies is nothing to it."""
    Marks(knobs.mark_file).write("engine")
    if os.environ.get("STANDIN_LEAVINGS") == "1":
        vllm_leavings.make(Marks(knobs.mark_file))
    _say(f"Starting to load model {options.model}...", "EngineCore")
    worker = _fork(lambda: _worker(options, knobs, ready, orders))
    os.close(ready)
    os.close(orders)
    os.waitpid(worker, 0)
    leave(1)


def _worker(options: Options, knobs: Knobs, ready: int, orders: int) -> None:
    Marks(knobs.mark_file).write("worker")
    _load(options, knobs)
    os.write(ready, b"ready")
    os.close(ready)
    kept = os.environ.get("STANDIN_SLEEP_KEEPS") == "1"
    core, sources = os.getppid(), [orders]
    while os.getppid() == core:  # it follows an EngineCore that dies, and does not mind an API server that does
        if not select.select(sources, [], [], 0.1)[0]:
            continue
        order = os.read(orders, 64)
        if not order:
            sources = []
        elif order.startswith(b"die"):
            _say("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.17 GiB.", "EngineCore")
            leave(1)
        elif options.sleeps and not kept:
            hold_on_gpus(_ASLEEP if order.startswith(b"sleep") else _held(options, knobs), [])
    leave(1)


_ASLEEP = 256 * _MIB
"""What it still holds asleep: its context."""


def _load(options: Options, knobs: Knobs) -> None:
    size = _held(options, knobs)
    for step in range(1, _STEPS + 1):
        hold_on_gpus(size * step // _STEPS, [])
        time.sleep(knobs.load_s * 0.75 / _STEPS)
    how = knobs.crash_while_loading
    if how == "oom":
        _say("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.17 GiB.", "EngineCore")
    elif how == "free":
        said = "Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory utilization (0.92)."
        _say(f"ValueError: {said} Decrease GPU memory utilization or reduce GPU memory used by other processes.", "EngineCore")
    if how is not None:
        leave(1)
    while knobs.never_ready:
        time.sleep(3600)
    _say("Model loading took 0.01 GiB memory and 0.1 seconds", "Worker")
    _say("GPU KV cache size: 65,536 tokens, Maximum concurrency for 256 tokens per request: 256.00x", "EngineCore")


def _held(options: Options, knobs: Knobs) -> int:
    """Bytes on all its cards together."""
    if not knobs.gpu_weights_mib:
        return int(knobs.gpu_mib * _MIB)
    from vllm_memory import claim

    return claim(options, int(knobs.gpu_weights_mib * _MIB), _say)
