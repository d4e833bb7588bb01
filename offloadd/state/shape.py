"""What a model file says of itself, as far as memory is concerned. Read from headers by `registry/readers`, used by estimates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from offloadd.units import Bytes


class LayerCache(StrEnum):
    """What one layer keeps for each sequence."""

    FULL = "full"
    """Keys and values of every token of the context."""
    SLIDING = "sliding"
    """Keys and values of the last `window` tokens."""
    RECURRENT = "recurrent"
    """A state of fixed size."""
    NONE = "none"
    """Nothing: its cache is another layer's, or it has no attention over the past."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One block. Rows are elements for one token, states f32 elements for one sequence; both 0 where they don't apply."""

    weights: Bytes
    """All tensors of the block but its experts."""
    experts: Bytes = Bytes(0)
    cache: LayerCache = LayerCache.FULL
    k_row: int = 0
    v_row: int = 0
    """0 where values are read out of the keys' cache (MLA)."""
    state: int = 0
    """May be there beside rows, in blocks with both kinds of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One model, all its parts together."""

    architecture: str
    kind: str = "model"
    """`model`, `mmproj` or `adapter`."""
    name: str = ""
    parameters: int = 0
    quantization: str = ""
    """As people say it: `Q4_K_M`, `F16`; empty when the file does not tell."""
    context_train: int = 0
    embedding: int = 0
    feed_forward: int = 0
    heads: int = 0
    vocabulary: int = 0
    window: int = 0
    """Tokens that a sliding layer looks back; 0 without one."""
    layers: tuple[LayerShape, ...] = ()
    token_embedding: Bytes = Bytes(0)
    output: Bytes = Bytes(0)
    """The output matrix; 0 when it is the token embedding again."""
    other: Bytes = Bytes(0)
    """Tensors that belong to no block, to neither embedding nor output."""
    working_row: int = 0
    """f32 elements for one token that the widest block has at hand at once; what compute buffers are made of."""
    attention_row: int = 0
    """The same within attention, but for its scores, which are there only without flash attention."""
    causal: bool = True
    """False for encoders, which keep no cache."""
    chat_template: bool = False
    tools: bool = False
    """Whether that template knows of tools. It is never rendered here."""
    pooling: str = ""
    """How token vectors become one, where the file says that: `mean`, `cls`, `last`, or `rank` for one that judges pairs."""
    senses: tuple[str, ...] = ()
    """What it takes beside text: `vision`, `audio`. Of a projector: what it turns into embeddings."""
    projection: int = 0
    """Of a projector: the length of those embeddings, which is its model's."""
    base: str = ""
    """Of an adapter: the model that it was made for, by the name that it gives it: a name, a hub id or a path."""
    rank: int = 0
    """Of an adapter in PEFT's layout: the highest of its matrices."""
    license: str = ""

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can be asked for."""
        if self.pooling == "rank":
            return ("rerank",)
        if not self.causal or self.pooling:
            return ("embedding",)
        tools = ("tools",) if self.chat_template and self.tools else ()
        return (*(("chat",) if self.chat_template else ()), "completion", *tools, *self.senses)

    @property
    def weights(self) -> Bytes:
        """All tensors, as they lie in the file."""
        blocks = sum(layer.weights + layer.experts for layer in self.layers)
        return Bytes(blocks + self.token_embedding + self.output + self.other)
