"""Metadata and tensors of a GGUF model to its `ModelShape`. Pure: the file has been read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from offloadd.registry.readers import patterns
from offloadd.registry.readers.facts import Facts
from offloadd.registry.readers.ggml import FILE_TYPES
from offloadd.registry.readers.gguf import GgufHeader
from offloadd.registry.readers.layers import LayerRules
from offloadd.registry.readers.tensors import Tensor
from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes

MAX_LAYERS = 1024
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,9})\.(.*)")
_EXPERTS = re.compile(r"ffn_(?:up|down|gate|gate_up)_(?:ch|)exps")
_FEED = ("ffn_up.weight", "ffn_gate.weight")
_TOOLS = re.compile(r"\b(?:tools|tool_calls)\b|\.Tools\b")
_POOLING = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
_INPUT = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")


def read_shape(header: GgufHeader) -> ModelShape:
    """What matters of the model for memory. Raises `HeaderError` for metadata that no model can have."""
    facts = Facts(header)
    tally = Tally()
    for tensor in header.tensors:
        tally.add(tensor)
    kind = facts.text("general.type") or ("mmproj" if facts.architecture == "clip" else "model")
    if kind != "model" or facts.architecture == "clip":
        return _companion(facts, tally, "mmproj" if facts.architecture == "clip" else kind)
    return _model(facts, tally)


@dataclass
class Tally:
    """Bytes of tensors by where they belong."""

    blocks: dict[int, int] = field(default_factory=dict)
    experts: dict[int, int] = field(default_factory=dict)
    token_embedding: int = 0
    output: int = 0
    other: int = 0
    elements: int = 0
    rows: int = 0
    """Rows of the token embedding, which comes first: the vocabulary."""
    feeds: dict[str, int] = field(default_factory=dict)
    """Rows of the tensors that widen to the feed-forward length, together twice that length where they are gated."""

    def add(self, tensor: Tensor) -> None:
        """Count one tensor."""
        self.elements += tensor.elements
        block = _BLOCK.fullmatch(tensor.name)
        if block is not None:
            self._add_to_block(int(block[1]), block[2], tensor)
        elif tensor.name in _INPUT:
            self.token_embedding += tensor.bytes
            self.rows = self.rows or tensor.elements // max(1, tensor.width)
        elif tensor.name == "output.weight":
            self.output += tensor.bytes
        else:
            self.other += tensor.bytes

    def _add_to_block(self, number: int, name: str, tensor: Tensor) -> None:
        of = self.experts if _EXPERTS.match(name) else self.blocks
        of[number] = of.get(number, 0) + tensor.bytes
        if name in _FEED:
            self.feeds[name] = max(self.feeds.get(name, 0), tensor.elements // max(1, tensor.width))

    @property
    def weights(self) -> int:
        """All of it."""
        return sum(self.blocks.values()) + sum(self.experts.values()) + self.token_embedding + self.output + self.other


def _companion(facts: Facts, tally: Tally, kind: str) -> ModelShape:
    """A projector or an adapter: loaded whole, beside a model. A projector's context is the patches of one image."""
    part = "vision." if facts.number("vision.block_count") else ""
    edge, patch = facts.number(f"{part}image_size"), facts.number(f"{part}patch_size")
    return ModelShape(
        architecture=facts.architecture,
        kind=kind,
        name=facts.text("general.name"),
        parameters=tally.elements,
        quantization=_quantization(facts),
        context_train=(edge // patch) ** 2 if patch else 0,
        embedding=facts.number(f"{part}embedding_length"),
        feed_forward=facts.number(f"{part}feed_forward_length"),
        heads=facts.number(f"{part}attention.head_count"),
        other=Bytes(tally.weights),
        causal=False,
        senses=tuple(sense for sense in ("vision", "audio") if facts.flag(f"has_{sense}_encoder", default=False)),
        projection=facts.number(f"{part}projection_dim") or facts.number("audio.projection_dim"),
        base=facts.text("general.base_model.0.name"),
        license=facts.text("general.license"),
    )


def _model(facts: Facts, tally: Tally) -> ModelShape:
    blocks = facts.number("block_count")
    if blocks > MAX_LAYERS:
        raise facts.refuse("block_count", f"{blocks} blocks are more than the {MAX_LAYERS} that are read")
    stray = max([*tally.blocks, *tally.experts], default=-1)
    if stray >= blocks:
        raise facts.refuse("block_count", f"{blocks} blocks, yet there are tensors of block {stray}")
    rules = LayerRules(facts, blocks)
    layers = tuple(_layer(rules, tally, index) for index in range(blocks))
    return ModelShape(
        architecture=facts.architecture,
        name=facts.text("general.name"),
        parameters=tally.elements,
        quantization=_quantization(facts),
        context_train=facts.number("context_length"),
        embedding=facts.number("embedding_length"),
        feed_forward=max(facts.per_layer("feed_forward_length", blocks, 0), default=0),
        heads=max(rules.heads, default=0),
        vocabulary=facts.items("tokenizer.ggml.tokens") or facts.number("vocab_size") or tally.rows,
        window=rules.window if any(layer.cache == LayerCache.SLIDING for layer in layers) else 0,
        layers=layers,
        token_embedding=Bytes(tally.token_embedding),
        output=Bytes(tally.output),
        other=Bytes(tally.other),
        working_row=rules.working_row(feed_rows=sum(tally.feeds.values())),
        attention_row=rules.attention_row(),
        causal=facts.architecture not in patterns.NO_CACHE and facts.flag("attention.causal", default=True),
        chat_template=facts.has("tokenizer.chat_template"),
        tools=knows_tools(facts.text("tokenizer.chat_template")),
        pooling=_POOLING.get(facts.number("pooling_type"), ""),
        license=facts.text("general.license"),
    )


def _layer(rules: LayerRules, tally: Tally, index: int) -> LayerShape:
    cache = rules.cache(index)
    has_rows = cache in (LayerCache.FULL, LayerCache.SLIDING)
    k_row, v_row = rules.rows(index) if has_rows else (0, 0)
    return LayerShape(
        weights=Bytes(tally.blocks.get(index, 0)),
        experts=Bytes(tally.experts.get(index, 0)),
        cache=cache,
        k_row=k_row,
        v_row=v_row,
        state=rules.state(index) if cache != LayerCache.NONE else 0,
    )


def knows_tools(template: str) -> bool:
    """Whether a chat template speaks of tools, by its words alone."""
    return _TOOLS.search(template) is not None


def _quantization(facts: Facts) -> str:
    return FILE_TYPES.get(facts.whole("general.file_type", -1), "")
