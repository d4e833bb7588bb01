"""How much memory vLLM and TGI need at least for a model in Hugging Face's layout, on one card or divided evenly. Pure arithmetic.

Both take all that they are given: what is worked out here makes them start and serve `parallel` sequences of `context` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes, format_bytes

GIB = 2**30
DEVICE_CONTEXT = Bytes(512 * 2**20)
"""What a process takes of each card before its first tensor. An assumption, not measured."""
_LEAST_WORK = Bytes(GIB // 2)
_GRAPHS = Bytes(GIB)
_COLLECTIVES = Bytes(GIB // 4)
"""Buffers by which several cards talk to each other."""
_BLOCK = 16
"""Tokens that are given to a sequence at once."""
_STATE = 4
"""Bytes of one element of a recurrent state."""
_MOST_CARDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HubMemory:
    """The parts of one server's memory on a single card."""

    weights: Bytes
    cache: Bytes
    work: Bytes
    """Activations of the largest batch, and graphs of it."""
    heads: int
    cache_parts: int
    """Over how many cards the cache can be divided; each holds one head's keys and values at least."""

    @property
    def total(self) -> Bytes:
        """On one card."""
        return self.on_each(1)

    @property
    def even(self) -> dict[int, Bytes]:
        """On each of several cards, by how many they are: as many as divide its heads."""
        counts = [count for count in range(2, _MOST_CARDS + 1) if self.heads and self.heads % count == 0]
        return {count: self.on_each(count) for count in counts}

    def on_each(self, cards: int) -> Bytes:
        """What one of so many cards takes."""
        cache = -(-self.cache // min(cards, self.cache_parts))
        return Bytes(-(-self.weights // cards) + cache + self.work + DEVICE_CONTEXT + (_COLLECTIVES if cards > 1 else 0))

    @property
    def basis(self) -> str:
        """As an operator would say it."""
        return f"weights {format_bytes(self.weights)} + cache {format_bytes(self.cache)} + work {format_bytes(self.work)}"


def hub_memory(
    shape: ModelShape,
    *,
    context: int,
    parallel: int,
    batch: int,
    cache_bytes: int = 2,
    cache: Bytes | None = None,
    graphs: bool = True,
    weights: Bytes | None = None,
) -> HubMemory:
    """The memory of a server for `parallel` sequences of `context` tokens, which computes `batch` tokens at once.

    `cache_bytes` is the size of one element of the cache. `cache` and `weights` replace what would be worked out.
    """
    worked_out = sum(_layer_cache(layer, shape.window, context, parallel, batch, cache_bytes) for layer in shape.layers)
    work = max(_LEAST_WORK, batch * (8 * shape.embedding + 3 * shape.feed_forward) * 2 + parallel * shape.vocabulary * 8)
    head = shape.embedding // shape.heads if shape.heads else 0
    rows = [layer.k_row for layer in shape.layers if layer.k_row and layer.v_row]
    return HubMemory(
        weights=shape.weights if weights is None else weights,
        cache=Bytes(worked_out) if cache is None else cache,
        work=Bytes(work + (_GRAPHS if graphs else 0)),
        heads=shape.heads,
        # Latent attention keeps one row that no head owns: every card has all of it.
        cache_parts=max(1, min(rows) // head) if rows and head else 1,
    )


def _layer_cache(layer: LayerShape, window: int, context: int, parallel: int, batch: int, size: int) -> int:
    """Bytes that one layer keeps for all sequences."""
    tokens = {LayerCache.FULL: context, LayerCache.SLIDING: min(context, window + batch)}.get(layer.cache, 0)
    cells = -(-tokens // _BLOCK) * _BLOCK * parallel
    return cells * (layer.k_row + layer.v_row) * size + layer.state * _STATE * parallel
