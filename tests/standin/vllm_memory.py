"""What vLLM takes of its cards: the share that it is told, whatever the model; or weights and an exact cache."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pynvml
from llama_process import leave
from vllm_flags import Options

_CONTEXT = 400 * 2**20
"""Taken of each card before anything is counted."""
_WORK = 512 * 2**20


def claim(options: Options, weights: int, say: Callable[[str, str], None]) -> int:
    """Bytes that it will hold on all its cards; it ends when its share is not free at this moment, as the fake NVML tells."""
    pynvml.nvmlInit()
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    own = os.path.join(os.environ.get("FAKE_NVML_PROCS", ""), str(os.getpid()))
    woken = os.path.exists(own)
    held = 0
    for card in cards:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(card))
        wanted = math.ceil(memory.total * options.share)
        if wanted > memory.free and not woken:
            gib = 2**30
            shown = f"({memory.free / gib:.2f}/{memory.total / gib:.2f} GiB)"
            said = f"Free memory on device cuda:0 {shown} on startup is less than desired GPU memory utilization ({options.share})."
            say(f"ValueError: {said}", "EngineCore")
            leave(1)
        need = weights // len(cards) + _WORK
        if not options.cache_bytes and need >= wanted:
            said = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine"
            say(f"ValueError: {said}", "EngineCore")
            leave(1)
        held += _CONTEXT + (need + options.cache_bytes if options.cache_bytes else wanted)
    return held
