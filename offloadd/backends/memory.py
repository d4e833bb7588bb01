"""How much memory `llama-server` takes for a model, from the model's shape and the options. Pure arithmetic.

The rules are those of build b10434; `python -m bench.estimates` compares them with what the server itself reports (docs/memory.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes

CACHE_BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
}
"""Cache type to (elements, bytes) of a block."""
DEVICE_CONTEXT = Bytes(512 * 2**20)
"""What a process takes of each card before its first tensor: driver context, kernels, cuBLAS. An assumption, not measured."""

_CELLS = 256
_F32 = 4
_DEFAULT_BATCH = 2048
_NO_SCORES = frozenset({"lfm2", "lfm2moe"})
"""Compute no scores over the vocabulary when they are asked for embeddings."""
_COPIES = 4
"""How many copies of a batch's inputs the server keeps when it spreads layers over several cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The memory of one block of layers."""

    weights: Bytes
    experts: Bytes
    cache: Bytes

    @property
    def total(self) -> Bytes:
        """Weights, experts and cache."""
        return Bytes(self.weights + self.experts + self.cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Memory by where it lies: host RAM, and each device in order."""

    host: Bytes
    devices: tuple[Bytes, ...]

    @property
    def total(self) -> Bytes:
        """Host and devices."""
        return Bytes(self.host + sum(self.devices))


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaMemory:
    """The parts of one server's memory. Which of them a device takes depends on how many layers go there: `spread`."""

    blocks: tuple[Block, ...]
    token_embedding: Bytes
    """Stays in host RAM."""
    output_layer: Bytes
    """The output matrix and what belongs to no block; counts as one more layer, the first to go to a device."""
    tied: bool
    """The output matrix is the token embedding again: a device gets a copy of it."""
    inputs: Bytes
    """The part of `compute` that masks and embedded tokens take."""
    compute: Bytes
    output_buffer: Bytes
    output_growth: Bytes = Bytes(0)
    """By how much the output buffer grows at the first full batch."""
    projector: Bytes = Bytes(0)
    adapters: Bytes = Bytes(0)
    draft: LlamaMemory | None = None
    checkpoint: Bytes = Bytes(0)
    """One saved state of one slot, where layers slide or are recurrent. In no sum: the server keeps up to `--ctx-checkpoints` of
    them for each slot in host RAM, as conversations go on."""

    @property
    def weights(self) -> Bytes:
        """All tensors of the model, as the server reports them on the CPU."""
        blocks = sum(block.weights + block.experts for block in self.blocks)
        return Bytes(blocks + self.token_embedding + self.output_layer)

    @property
    def cache(self) -> Bytes:
        """Keys, values and states of all sequences."""
        return Bytes(sum(block.cache for block in self.blocks))

    @property
    def per_layer(self) -> tuple[Bytes, ...]:
        """What each layer takes where it lies, the output layer last."""
        return (*(block.total for block in self.blocks), self._output_on_device)

    @property
    def fixed_device(self) -> Bytes:
        """What each device takes beside its layers."""
        return Bytes(self.compute + DEVICE_CONTEXT)

    @property
    def host(self) -> Bytes:
        """Host RAM when all layers are on devices."""
        return Bytes(self.token_embedding + self.inputs + self.output_buffer + self.output_growth)

    @property
    def total(self) -> Bytes:
        """Everything in one place without a device context: the CPU."""
        own = self.weights + self.cache + self.compute + self.output_buffer + self.output_growth + self.projector + self.adapters
        return Bytes(own + (self.draft.total if self.draft else 0))

    def spread(self, *, gpu_layers: int | None = None, shares: Sequence[float] = (1.0,), experts_on_host: int = 0) -> Spread:
        """Memory by place, as `--n-gpu-layers`, `--tensor-split` and `--n-cpu-moe` would have it.

        `gpu_layers` counts the output layer and is taken from the end; None is all. The first device holds projector and draft.
        """
        count = len(self.blocks) + 1
        wanted = count if gpu_layers is None else max(0, min(gpu_layers, count))
        if not wanted:
            return Spread(host=self.total, devices=(Bytes(0),) * len(shares))
        devices = [int(self.fixed_device)] * len(shares)
        host = int(self.host) + self._host_compute(wanted, count)
        bounds = _bounds(shares)
        for index in range(count):
            on_device, on_host = self._layer(index, index < experts_on_host)
            host += on_host
            if index < count - wanted:
                host += on_device
            else:
                devices[min(bisect_right(bounds, (index - count + wanted) / wanted), len(shares) - 1)] += on_device
        return self._with_companions(host, devices, wanted == count)

    def _host_compute(self, wanted: int, count: int) -> int:
        return 0 if wanted == count else int(self.compute - self.inputs)

    def _layer(self, index: int, keep_experts: bool) -> tuple[int, int]:
        """Bytes of one layer on its device, and those that stay on the host."""
        if index == len(self.blocks):
            return int(self._output_on_device), 0
        block = self.blocks[index]
        return (int(block.weights + block.cache), int(block.experts)) if keep_experts else (int(block.total), 0)

    def _with_companions(self, host: int, devices: list[int], whole: bool) -> Spread:
        if len(devices) > 1 and whole:
            devices = [size + (_COPIES - 1) * int(self.inputs) for size in devices]
        devices[0] += int(self.projector + self.adapters)
        if self.draft is not None:
            on_device = self.draft.spread()
            host += int(on_device.host)
            # One process has one context on a card, whatever it loads.
            devices[0] += int(on_device.devices[0] - DEVICE_CONTEXT)
        return Spread(host=Bytes(host), devices=tuple(Bytes(size) for size in devices))

    @property
    def _output_on_device(self) -> Bytes:
        return Bytes(self.output_layer + (self.token_embedding if self.tied else 0))


def llama_memory(
    shape: ModelShape,
    *,
    context: int,
    parallel: int = 1,
    kv_unified: bool = False,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    batch: int = _DEFAULT_BATCH,
    ubatch: int = 512,
    flash_attention: bool = True,
    embeddings: bool = False,
    swa_full: bool = False,
    projector: ModelShape | None = None,
    adapters: Iterable[ModelShape] = (),
    draft: LlamaMemory | None = None,
) -> LlamaMemory:
    """The memory of a server started with these options. `context` is `--ctx-size`: all slots together, 0 for the model's own.

    `flash_attention` says whether it will be used: `auto` does wherever the backend can. Raises KeyError for an unknown cache type.
    """
    sizes = _Sizes(
        shape,
        context=context or shape.context_train,
        parallel=parallel,
        unified=kv_unified,
        ubatch=min(ubatch, batch),
        flash=flash_attention,
        swa_full=swa_full,
        key=CACHE_BLOCKS[cache_type_k],
        value=CACHE_BLOCKS[cache_type_v],
    )
    scores = sizes.tokens if embeddings and shape.causal and shape.architecture not in _NO_SCORES else parallel
    buffer = parallel * (shape.vocabulary + shape.embedding * embeddings) * _F32
    grown = sizes.tokens * (shape.vocabulary + shape.embedding) * _F32 if embeddings else 0
    return LlamaMemory(
        blocks=tuple(Block(weights=layer.weights, experts=layer.experts, cache=sizes.cache(layer)) for layer in shape.layers),
        token_embedding=shape.token_embedding,
        output_layer=Bytes(shape.output + shape.other),
        tied=shape.output == 0 and shape.causal,
        inputs=Bytes(sizes.inputs),
        compute=Bytes(sizes.compute(scores)),
        output_buffer=Bytes(buffer),
        output_growth=Bytes(max(0, grown - buffer)),
        projector=_projector(projector) if projector else Bytes(0),
        adapters=Bytes(sum(adapter.weights for adapter in adapters)),
        draft=draft,
        checkpoint=Bytes(sum(sizes.checkpoint(layer) for layer in shape.layers)),
    )


class _Sizes:
    """Cells and tokens that follow from the options. `tokens` are those computed at once."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        context: int,
        parallel: int,
        unified: bool,
        ubatch: int,
        flash: bool,
        swa_full: bool,
        key: tuple[int, int],
        value: tuple[int, int],
    ) -> None:
        self._shape, self._parallel, self._flash, self._key, self._value = shape, parallel, flash, key, value
        whole = _pad(context)
        self._streams = 1 if unified else parallel
        self._cells = whole if unified else _pad(whole // parallel)
        self.tokens = min(ubatch, self._cells * self._streams)
        reach = shape.window * (parallel if unified else 1) + self.tokens
        self._sliding_cells = self._cells if swa_full else _pad(min(self._cells, reach))
        self._widest_value = max((layer.v_row for layer in shape.layers), default=0)
        self._kinds = {layer.cache for layer in shape.layers}

    def cache(self, layer: LayerShape) -> Bytes:
        """Bytes that one layer keeps for all sequences."""
        cells = self._cells_of(layer)
        # Without flash attention values lie transposed, all layers as wide as the widest.
        v_row = layer.v_row if self._flash or not layer.v_row else self._widest_value
        return Bytes(cells * (_row(layer.k_row, self._key) + _row(v_row, self._value)) + layer.state * _F32 * self._parallel)

    def checkpoint(self, layer: LayerShape) -> int:
        """The part of one layer's cache that a checkpoint of one sequence copies, at most."""
        states = layer.state * _F32
        if layer.cache != LayerCache.SLIDING:
            return states
        return self._sliding_cells * (_row(layer.k_row, self._key) + _row(layer.v_row, self._value)) + states

    def _cells_of(self, layer: LayerShape) -> int:
        cells = {LayerCache.FULL: self._cells, LayerCache.SLIDING: self._sliding_cells}
        return cells.get(layer.cache, 0) * self._streams

    @property
    def inputs(self) -> int:
        """Masks: which cell each token may see."""
        return self._mask_cells * self.tokens * (2 if self._flash else _F32)

    def compute(self, scores: int) -> int:
        """The buffer for one batch, of which `scores` tokens get a score for each word of the vocabulary."""
        words, embedding = self._shape.vocabulary, self._shape.embedding
        # Masks are no longer needed when the scores are computed, but their place is taken only if it is large enough.
        last = max(self.inputs + scores * (words + embedding) * _F32, scores * (words + 3 * embedding) * _F32)
        return max(self.inputs + self.working, last)

    @property
    def working(self) -> int:
        """What a block needs while it is computed."""
        shape = self._shape
        states = max((layer.state for layer in shape.layers), default=0) * self._parallel * _F32
        working = shape.working_row * self.tokens * _F32 + states
        if not self._mask_cells:
            return working
        if self._flash:
            return max(working, shape.attention_row * self.tokens * _F32 + self._copies) if self._copies else working
        seen = self.tokens if self._encodes else self._cells if LayerCache.FULL in self._kinds else self._sliding_cells
        return max(working, (shape.heads * seen + shape.attention_row) * self.tokens * _F32)

    @property
    def _copies(self) -> int:
        """Flash attention reads no f32: it makes an f16 copy of the layer's keys, and of its values."""
        keys, values = self._key == CACHE_BLOCKS["f32"], self._value == CACHE_BLOCKS["f32"]
        # Latent attention's values are keys, and copied once more.
        sizes = (
            self._cells_of(layer) * (layer.k_row * keys + (layer.v_row or layer.k_row) * values) * 2 for layer in self._shape.layers
        )
        return max(sizes, default=0)

    @property
    def _encodes(self) -> bool:
        return self._kinds <= {LayerCache.NONE} and self._shape.heads > 0

    @property
    def _mask_cells(self) -> int:
        if self._encodes:
            return self.tokens
        full = self._cells if LayerCache.FULL in self._kinds else 0
        return full + (self._sliding_cells if LayerCache.SLIDING in self._kinds else 0)


def _projector(shape: ModelShape) -> Bytes:
    """The whole file, and room to see one image at its full size; without flash attention, which not every projector has."""
    patches = shape.context_train
    rows = 3 * shape.feed_forward + 5 * shape.embedding + shape.heads * patches
    return Bytes(shape.weights + patches * rows * _F32)


def _bounds(shares: Sequence[float]) -> list[float]:
    whole = sum(shares)
    return [part / whole for part in accumulate(shares)]


def _pad(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _row(elements: int, block: tuple[int, int]) -> int:
    return -(-elements // block[0]) * block[1]
