"""What TGI takes of its cards: weights, and then cache until the whole card, others included, is as full as its fraction allows."""

from __future__ import annotations

import os

import pynvml
from llama_process import Knobs, hold_on_gpus
from tgi_flags import Options

_WIGGLE = 0.90
"""TGI's own margin, on top of the fraction."""
_BLOCK = 2**20


def take_cache(options: Options, knobs: Knobs) -> int:
    """Hold weights and cache on the visible cards, which the fake libnvidia-ml.so.1 shows; the number of cache blocks."""
    pynvml.nvmlInit()
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    weights = int(knobs.gpu_weights_mib * 2**20) // len(cards)
    room = min(_room(card, options.cuda_memory_fraction) for card in cards) - weights
    cache = max(0, room) // _BLOCK * _BLOCK
    hold_on_gpus((weights + cache) * len(cards), [])
    return cache // _BLOCK


def _room(card: str, fraction: float) -> int:
    memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(card))
    return int(memory.free - (1 - fraction * _WIGGLE) * memory.total)
