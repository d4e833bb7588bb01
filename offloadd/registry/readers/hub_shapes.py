"""`config.json` and tensor names in Hugging Face's layout to a `ModelShape`. Pure: the files have been read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offloadd.registry.readers.tensors import Tensor
from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes

MAX_LAYERS = 1024
_MAX = 2**40
_LAYER = re.compile(
    r"(?:(?:model|language_model|text_model|transformer|backbone|gpt_neox|encoder|decoder|bert|roberta)\.)*"
    r"(?:layers|layer|h|blocks)\.(\d{1,9})\.(.*)"
)
_EXPERTS = re.compile(r"(?:.*\.)?experts\.")
_EMBEDDING = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "backbone.embeddings.weight")
_OUTPUT = ("lm_head.weight", "embed_out.weight", "output.weight")
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "distilbert", "mpnet", "camembert"})
_RECURRENT = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv6", "rwkv7"})
_KINDS = {
    "sliding_attention": LayerCache.SLIDING,
    "chunked_attention": LayerCache.SLIDING,
    "full_attention": LayerCache.FULL,
    "attention": LayerCache.FULL,
    "linear_attention": LayerCache.RECURRENT,
    "mamba": LayerCache.RECURRENT,
    "conv": LayerCache.RECURRENT,
    "recurrent": LayerCache.RECURRENT,
}
_LETTERS = {"M": LayerCache.RECURRENT, "*": LayerCache.FULL, "-": LayerCache.NONE, "E": LayerCache.NONE}


@dataclass
class HubTally:
    """Bytes of tensors by where they belong."""

    layers: dict[int, int] = field(default_factory=dict)
    experts: dict[int, int] = field(default_factory=dict)
    embedding: int = 0
    output: int = 0
    other: int = 0
    elements: int = 0

    def add(self, tensor: Tensor) -> None:
        """Count one tensor."""
        self.elements += tensor.elements
        layer = _LAYER.fullmatch(tensor.name)
        if layer is not None and int(layer[1]) < MAX_LAYERS:
            of = self.experts if _EXPERTS.match(layer[2]) else self.layers
            of[int(layer[1])] = of.get(int(layer[1]), 0) + tensor.bytes
        elif tensor.name.endswith(_EMBEDDING):
            self.embedding += tensor.bytes
        elif tensor.name.endswith(_OUTPUT):
            self.output += tensor.bytes
        else:
            self.other += tensor.bytes


def hub_shape(config: Mapping[str, Any], tally: HubTally) -> ModelShape:
    """What matters for memory. Raises ValueError, with the key, for numbers that no model has."""
    text = _Config(config)
    kind = text.string("model_type")
    count = text.number("num_hidden_layers", "n_layer", "num_layers")
    if count > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers: {count} are more than the {MAX_LAYERS} that are read")
    rules = _Rules(text, kind, count)
    # Layers behind the last one help to guess tokens ahead, and belong to no other.
    beyond = sum(size for of in (tally.layers, tally.experts) for index, size in of.items() if index >= count)
    return ModelShape(
        architecture=kind,
        parameters=tally.elements,
        quantization=_quantization(config, text),
        context_train=text.number("max_position_embeddings", "n_positions", "max_sequence_length"),
        embedding=text.number("hidden_size", "n_embd", "d_model"),
        feed_forward=text.number("intermediate_size", "n_inner", "ffn_dim"),
        heads=rules.heads,
        vocabulary=text.number("vocab_size"),
        window=rules.window,
        layers=tuple(rules.layer(index, tally) for index in range(count)),
        token_embedding=Bytes(tally.embedding),
        output=Bytes(tally.output),
        other=Bytes(tally.other + beyond),
        causal=kind not in _ENCODERS,
    )


class _Config:
    """Typed access to a config; a model that also sees or hears keeps its language part in a config of its own."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        inner = config.get("text_config") or config.get("llm_config")
        self._of = {**config, **inner} if isinstance(inner, dict) else config

    def number(self, *names: str, default: int = 0) -> int:
        """The first of the names that has a whole number."""
        for name in names:
            value = self._of.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if not 0 <= value <= _MAX:
                    raise ValueError(f"{name}: is out of all proportion")
                return value
        return default

    def string(self, name: str) -> str:
        """A string, else an empty one."""
        value = self._of.get(name)
        return value if isinstance(value, str) else ""

    def strings(self, *names: str) -> Sequence[str]:
        """A list of strings."""
        for name in names:
            value = self._of.get(name)
            if isinstance(value, list) and len(value) <= MAX_LAYERS:
                return [item if isinstance(item, str) else "" for item in value]
        return ()

    def flag(self, name: str, *, default: bool) -> bool:
        """A yes or no."""
        value = self._of.get(name)
        return value if isinstance(value, bool) else default


def _quantization(config: Mapping[str, Any], text: _Config) -> str:
    chosen = config.get("quantization_config")
    method = chosen.get("quant_method") if isinstance(chosen, dict) else None
    return method.upper() if isinstance(method, str) else text.string("dtype") or text.string("torch_dtype")


class _Rules:
    """What each layer keeps."""

    def __init__(self, config: _Config, kind: str, count: int) -> None:
        self._config, self._kind, self._count = config, kind, count
        self.heads = config.number("num_attention_heads", "n_head", "num_heads")
        hidden = config.number("hidden_size", "n_embd", "d_model")
        kv_heads = config.number("num_key_value_heads", "n_head_kv", "num_kv_heads", default=self.heads)
        head = config.number("head_dim", default=hidden // self.heads if self.heads else 0)
        rank = config.number("kv_lora_rank")
        self._rows = (rank + config.number("qk_rope_head_dim"), 0) if rank else (kv_heads * head, kv_heads * head)
        self._kinds = self._layer_kinds()
        self.window = config.number("sliding_window", "attention_chunk_size") if LayerCache.SLIDING in self._kinds else 0

    def layer(self, index: int, tally: HubTally) -> LayerShape:
        """One layer with its weights."""
        cache = self._kinds[index]
        k_row, v_row = self._rows if cache in (LayerCache.FULL, LayerCache.SLIDING) else (0, 0)
        return LayerShape(
            weights=Bytes(tally.layers.get(index, 0)),
            experts=Bytes(tally.experts.get(index, 0)),
            cache=cache,
            k_row=k_row,
            v_row=v_row,
            state=self._state() if cache == LayerCache.RECURRENT else 0,
        )

    def _layer_kinds(self) -> tuple[LayerCache, ...]:
        if self._kind in _ENCODERS:
            return (LayerCache.NONE,) * self._count
        if self._kind in _RECURRENT:
            return (LayerCache.RECURRENT,) * self._count
        named = [_KINDS.get(name, LayerCache.FULL) for name in self._config.strings("layer_types", "layers_block_type")]
        named = named or [_LETTERS.get(letter, LayerCache.FULL) for letter in self._config.string("hybrid_override_pattern")]
        if len(named) == self._count:
            return tuple(self._without_window(kind) for kind in named)
        return tuple(self._by_number(index) for index in range(self._count))

    def _without_window(self, kind: LayerCache) -> LayerCache:
        """Layers that would slide see everything when the config has no window."""
        has_window = self._config.number("sliding_window", "attention_chunk_size") > 0
        return LayerCache.FULL if kind == LayerCache.SLIDING and not has_window else kind

    def _by_number(self, index: int) -> LayerCache:
        """Rules of configs from before every layer was named."""
        if period := self._config.number("attn_layer_period"):
            offset = self._config.number("attn_layer_offset")
            return LayerCache.FULL if index % period == offset else LayerCache.RECURRENT
        if not self._config.number("sliding_window") or not self._config.flag("use_sliding_window", default=True):
            return LayerCache.FULL
        pattern = self._config.number("sliding_window_pattern", default=2 if self._kind == "gemma2" else 0)
        if pattern:
            return LayerCache.FULL if (index + 1) % pattern == 0 else LayerCache.SLIDING
        first = self._config.number("max_window_layers") if self._kind.startswith("qwen2") else 0
        return LayerCache.SLIDING if index >= first else LayerCache.FULL

    def _state(self) -> int:
        """Elements of a recurrent layer's state: what its convolution remembers, and the state proper."""
        number = self._config.number
        if value_heads := number("linear_num_value_heads"):
            key = number("linear_num_key_heads") * number("linear_key_head_dim")
            value = value_heads * number("linear_value_head_dim")
            kernel = max(1, number("linear_conv_kernel_dim"))
            return (kernel - 1) * (2 * key + value) + value * number("linear_key_head_dim")
        size = number("state_size", "mamba_d_state", "ssm_state_size")
        hidden = number("hidden_size", "d_model")
        inner = number("mamba_d_ssm") or number("mamba_expand", "expand", default=2) * hidden
        groups = number("n_groups", "mamba_n_groups")
        kernel = max(1, number("conv_kernel", "mamba_d_conv", "conv_L_cache", default=4))
        return (kernel - 1) * (inner + 2 * groups * size) + size * inner
