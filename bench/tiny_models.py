"""Tiny models with random weights, one per architecture, that a real llama-server loads. Sizes in elements; made with `gguf`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES


@dataclass(frozen=True)
class Sizes:
    """Of one model; the head size is embedding / heads wherever an architecture does not say another."""

    vocabulary: int = 8192
    embedding: int = 512
    feed_forward: int = 1408
    heads: int = 8
    kv_heads: int = 2
    layers: int = 6
    experts: int = 8
    experts_used: int = 2
    expert_feed_forward: int = 512

    @property
    def head(self) -> int:
        return self.embedding // self.heads


SMALL = Sizes()
OTHER = Sizes(
    vocabulary=16000,
    embedding=768,
    feed_forward=2560,
    heads=6,
    kv_heads=3,
    layers=5,
    experts=16,
    experts_used=4,
    expert_feed_forward=384,
)
"""No number was fitted to these; they brought one correction, which docs/memory.md names."""

_NOISE = np.random.default_rng(7).integers(0, 256, 2**16, dtype=np.uint8)
_RANDOM_F32 = np.random.default_rng(8).standard_normal(2**14).astype(np.float32)


class TinyModel:
    """Collects the metadata and tensors of one model, and writes them."""

    def __init__(self, path: Path, size: Sizes, arch: str, *, attends: bool = True) -> None:
        self.arch, self.size = arch, size
        self.writer = GGUFWriter(path, arch)
        self.key("block_count", size.layers)
        self.key("context_length", 32768)
        self.key("embedding_length", size.embedding)
        self.key("attention.head_count", size.heads if attends else 0)
        self.writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)

    def key(self, name: str, value: int | list[int] | list[bool] | float) -> None:
        full = f"{self.arch}.{name}"
        if isinstance(value, list):
            self.writer.add_array(full, value)
        elif isinstance(value, float):
            self.writer.add_float32(full, value)
        else:
            self.writer.add_uint32(full, value)

    def tensor(self, name: str, *sizes: int, kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> None:
        """Dimensions in ggml's order, the row first. Vectors and odd rows are f32, as in real files."""
        block, size = GGML_QUANT_SIZES[kind]
        shape = sizes[::-1]
        if len(sizes) == 1 or sizes[0] % block:
            self.writer.add_tensor(name, np.resize(_RANDOM_F32, shape))
            return
        rows = (*shape[:-1], sizes[0] // block * size)
        self.writer.add_tensor(name, np.resize(_NOISE, rows), raw_dtype=kind)

    def matrix(self, layer: int, name: str, *sizes: int) -> None:
        self.tensor(f"blk.{layer}.{name}.weight", *sizes)

    def vector(self, layer: int, name: str, size: int) -> None:
        self.tensor(f"blk.{layer}.{name}", size)

    def attention(
        self, layer: int, *, kv_heads: int | None = None, head: int | None = None, qk_norm: int = 0, bias: bool = False
    ) -> None:
        heads, head = self.size.heads, head or self.size.head
        kv_heads = kv_heads or self.size.kv_heads
        widths = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
        for part, width in widths.items():
            self.matrix(layer, f"attn_{part}", self.size.embedding, width)
            if bias:
                self.vector(layer, f"attn_{part}.bias", width)
        self.matrix(layer, "attn_output", heads * head, self.size.embedding)
        if qk_norm:
            self.vector(layer, "attn_q_norm.weight", qk_norm)
            self.vector(layer, "attn_k_norm.weight", qk_norm)

    def dense(self, layer: int) -> None:
        width = self.size.feed_forward
        self.matrix(layer, "ffn_gate", self.size.embedding, width)
        self.matrix(layer, "ffn_up", self.size.embedding, width)
        self.matrix(layer, "ffn_down", width, self.size.embedding)

    def experts(self, layer: int, width: int | None = None) -> None:
        width = width or self.size.expert_feed_forward
        self.matrix(layer, "ffn_gate_inp", self.size.embedding, self.size.experts)
        self.matrix(layer, "ffn_gate_exps", self.size.embedding, width, self.size.experts)
        self.matrix(layer, "ffn_up_exps", self.size.embedding, width, self.size.experts)
        self.matrix(layer, "ffn_down_exps", width, self.size.embedding, self.size.experts)

    def norms(self, layer: int, *names: str) -> None:
        for name in names:
            self.vector(layer, f"{name}.weight", self.size.embedding)

    def embedding(self, *, tied: bool = False, kind: GGMLQuantizationType = GGMLQuantizationType.Q6_K) -> None:
        self.tensor("token_embd.weight", self.size.embedding, self.size.vocabulary, kind=kind)
        self.tensor("output_norm.weight", self.size.embedding)
        if not tied:
            self.tensor("output.weight", self.size.embedding, self.size.vocabulary, kind=kind)

    def vocabulary(self) -> None:
        """A vocabulary of the kind that SentencePiece makes: three controls, all bytes, then words."""
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        types = [2, 3, 3, *[6] * 256]
        words = [f"\u2581w{number}" for number in range(self.size.vocabulary - len(tokens))]
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list([*tokens, *words])
        self.writer.add_token_scores([-float(index) for index in range(self.size.vocabulary)])
        self.writer.add_token_types([*types, *[1] * len(words)])
        for add, token in ((self.writer.add_unk_token_id, 0), (self.writer.add_bos_token_id, 1), (self.writer.add_eos_token_id, 2)):
            add(token)

    def word_pieces(self) -> None:
        """A vocabulary of BERT's kind."""
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokens += [f"\u2581w{number}" for number in range(self.size.vocabulary - len(tokens))]
        self.writer.add_tokenizer_model("bert")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types([3] * 5 + [1] * (self.size.vocabulary - 5))
        self.writer.add_token_type_count(2)
        self.writer.add_pad_token_id(0)
        self.writer.add_unk_token_id(1)
        self.writer.add_bos_token_id(2)
        self.writer.add_sep_token_id(3)
        self.writer.add_mask_token_id(4)

    def write(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _grouped(path: Path, size: Sizes, arch: str, *, kv_heads: int | None = None, head: int | None = None) -> TinyModel:
    """A model whose keys say feed-forward length, KV heads and head size, as most do."""
    model = TinyModel(path, size, arch)
    model.key("feed_forward_length", size.feed_forward)
    model.key("attention.head_count_kv", kv_heads or size.kv_heads)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        model.key(name, head or size.head)
    model.vocabulary()
    return model


def _moe_keys(model: TinyModel, *, own_length: bool = True) -> None:
    model.key("expert_count", model.size.experts)
    model.key("expert_used_count", model.size.experts_used)
    if own_length:
        model.key("expert_feed_forward_length", model.size.expert_feed_forward)


def llama(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "llama")
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.attention(layer)
        model.dense(layer)
    model.write()


def mixtral(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "llama")
    _moe_keys(model, own_length=False)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.attention(layer)
        model.experts(layer, size.feed_forward)
    model.write()


def qwen2(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "qwen2")
    model.embedding(tied=True)
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.attention(layer, bias=True)
        model.dense(layer)
    model.write()


def qwen3(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "qwen3", head=128)
    model.embedding(tied=True)
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.attention(layer, head=128, qk_norm=128)
        model.dense(layer)
    model.write()


def qwen3moe(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "qwen3moe", head=128)
    _moe_keys(model)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.attention(layer, head=128, qk_norm=128)
        model.experts(layer)
    model.write()


def _gemma(path: Path, size: Sizes, arch: str, window: int, head: int, qk_norm: int) -> None:
    model = _grouped(path, size, arch, head=head)
    model.key("attention.sliding_window", window)
    model.embedding(tied=True)
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
        model.attention(layer, head=head, qk_norm=qk_norm)
        model.dense(layer)
    model.write()


def gemma2(path: Path, size: Sizes) -> None:
    _gemma(path, size, "gemma2", 1024, 128, 0)


def gemma3(path: Path, size: Sizes) -> None:
    _gemma(path, size, "gemma3", 512, 128, 128)


def phi3(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "phi3")
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.matrix(layer, "attn_qkv", size.embedding, (size.heads + 2 * size.kv_heads) * size.head)
        model.matrix(layer, "attn_output", size.embedding, size.embedding)
        model.matrix(layer, "ffn_up", size.embedding, 2 * size.feed_forward)
        model.matrix(layer, "ffn_down", size.feed_forward, size.embedding)
    model.write()


def _command(path: Path, size: Sizes, arch: str, window: int) -> None:
    model = _grouped(path, size, arch)
    model.writer.add_float32(f"{arch}.attention.layer_norm_epsilon", 1e-5)
    model.writer.add_float32(f"{arch}.logit_scale", 0.0625)
    if window:
        model.key("attention.sliding_window", window)
    model.embedding(tied=True)
    for layer in range(size.layers):
        model.norms(layer, "attn_norm")
        model.attention(layer)
        model.dense(layer)
    model.write()


def command_r(path: Path, size: Sizes) -> None:
    _command(path, size, "command-r", 0)


def cohere2(path: Path, size: Sizes) -> None:
    _command(path, size, "cohere2", 1024)


def olmo2(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "olmo2", kv_heads=size.heads)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "post_attention_norm", "post_ffw_norm")
        model.attention(layer, kv_heads=size.heads, qk_norm=size.embedding)
        model.dense(layer)
    model.write()


def gpt_oss(path: Path, size: Sizes) -> None:
    model = _grouped(path, size, "gpt-oss")
    _moe_keys(model)
    model.key("attention.sliding_window", 128)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "post_attention_norm")
        model.attention(layer, bias=True)
        model.vector(layer, "attn_output.bias", size.embedding)
        model.vector(layer, "attn_sinks.weight", size.heads)
        model.experts(layer)
        model.vector(layer, "ffn_gate_inp.bias", size.experts)
        for part, width in (("gate", size.expert_feed_forward), ("up", size.expert_feed_forward), ("down", size.embedding)):
            model.writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.bias", np.resize(_RANDOM_F32, (size.experts, width)))
    model.write()


def deepseek2(path: Path, size: Sizes) -> None:
    """Multi-head latent attention: one cached row of 256 + 64 for all heads."""
    rank, rope, plain, value, q_rank = 256, 64, 64, 64, 384
    model = TinyModel(path, size, "deepseek2")
    model.key("feed_forward_length", size.feed_forward)
    model.key("attention.head_count_kv", 1)
    model.key("attention.q_lora_rank", q_rank)
    model.key("attention.kv_lora_rank", rank)
    model.key("attention.key_length", rank + rope)
    model.key("attention.value_length", rank)
    model.key("attention.key_length_mla", plain + rope)
    model.key("attention.value_length_mla", value)
    model.key("rope.dimension_count", rope)
    model.key("leading_dense_block_count", 1)
    model.key("expert_shared_count", 1)
    model.key("expert_weights_scale", 1.0)
    _moe_keys(model)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        model.matrix(layer, "attn_q_a", size.embedding, q_rank)
        model.vector(layer, "attn_q_a_norm.weight", q_rank)
        model.matrix(layer, "attn_q_b", q_rank, size.heads * (plain + rope))
        model.matrix(layer, "attn_kv_a_mqa", size.embedding, rank + rope)
        model.vector(layer, "attn_kv_a_norm.weight", rank)
        model.matrix(layer, "attn_k_b", plain, rank, size.heads)
        model.matrix(layer, "attn_v_b", rank, value, size.heads)
        model.matrix(layer, "attn_output", size.heads * value, size.embedding)
        if layer == 0:
            model.dense(layer)
            continue
        model.experts(layer)
        for part in ("gate", "up"):
            model.matrix(layer, f"ffn_{part}_shexp", size.embedding, size.expert_feed_forward)
        model.matrix(layer, "ffn_down_shexp", size.expert_feed_forward, size.embedding)
    model.write()


def _state_keys(model: TinyModel, *, inner: int, state: int, rank: int, groups: int = 0) -> None:
    model.key("ssm.conv_kernel", 4)
    model.key("ssm.inner_size", inner)
    model.key("ssm.state_size", state)
    model.key("ssm.time_step_rank", rank)
    if groups:
        model.key("ssm.group_count", groups)


def _mamba_block(model: TinyModel, layer: int, *, inner: int, state: int, rank: int) -> None:
    model.matrix(layer, "ssm_in", model.size.embedding, 2 * inner)
    model.matrix(layer, "ssm_conv1d", 4, inner)
    model.vector(layer, "ssm_conv1d.bias", inner)
    model.matrix(layer, "ssm_x", inner, rank + 2 * state)
    model.matrix(layer, "ssm_dt", rank, inner)
    model.vector(layer, "ssm_dt.bias", inner)
    model.writer.add_tensor(f"blk.{layer}.ssm_a", np.resize(_RANDOM_F32, (inner, state)))
    model.vector(layer, "ssm_d", inner)
    model.matrix(layer, "ssm_out", inner, model.size.embedding)


def _mamba2_block(model: TinyModel, layer: int, *, inner: int, state: int, heads: int, groups: int = 1) -> None:
    mixed = inner + 2 * groups * state
    model.matrix(layer, "ssm_in", model.size.embedding, inner + mixed + heads)
    model.matrix(layer, "ssm_conv1d", 4, mixed)
    model.vector(layer, "ssm_conv1d.bias", mixed)
    model.vector(layer, "ssm_dt.bias", heads)
    for name in ("ssm_a", "ssm_d"):
        model.writer.add_tensor(f"blk.{layer}.{name}", np.resize(_RANDOM_F32, (heads, 1)))
    model.writer.add_tensor(f"blk.{layer}.ssm_norm.weight", np.resize(_RANDOM_F32, (groups, inner // groups)))
    model.matrix(layer, "ssm_out", inner, model.size.embedding)


def mamba(path: Path, size: Sizes) -> None:
    model = TinyModel(path, size, "mamba", attends=False)
    model.key("feed_forward_length", 0)
    _state_keys(model, inner=2 * size.embedding, state=16, rank=32)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm")
        _mamba_block(model, layer, inner=2 * size.embedding, state=16, rank=32)
    model.write()


def mamba2(path: Path, size: Sizes) -> None:
    model = TinyModel(path, size, "mamba2", attends=False)
    model.key("feed_forward_length", 0)
    _state_keys(model, inner=2 * size.embedding, state=128, rank=size.embedding // 32, groups=1)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm")
        _mamba2_block(model, layer, inner=2 * size.embedding, state=128, heads=size.embedding // 32)
    model.write()


def jamba(path: Path, size: Sizes) -> None:
    """Attention in every third block, a recurrent state in the others."""
    model = TinyModel(path, size, "jamba")
    model.key("attention.head_count_kv", [size.kv_heads if layer % 3 == 2 else 0 for layer in range(size.layers)])
    model.key("feed_forward_length", size.feed_forward)
    _state_keys(model, inner=2 * size.embedding, state=16, rank=32)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        if layer % 3 == 2:
            model.attention(layer)
        else:
            _mamba_block(model, layer, inner=2 * size.embedding, state=16, rank=32)
            for name, width in (("dt", 32), ("b", 16), ("c", 16)):
                model.vector(layer, f"ssm_{name}_norm.weight", width)
        model.dense(layer)
    model.write()


def falcon_h1(path: Path, size: Sizes) -> None:
    """Attention and a recurrent state side by side in every block."""
    model = _grouped(path, size, "falcon-h1")
    _state_keys(model, inner=size.embedding, state=64, rank=size.embedding // 64, groups=1)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm")
        model.vector(layer, "ffn_norm", size.embedding)
        model.attention(layer)
        _mamba2_block(model, layer, inner=size.embedding, state=64, heads=size.embedding // 64)
        model.dense(layer)
    model.write()


def granite_hybrid(path: Path, size: Sizes) -> None:
    model = TinyModel(path, size, "granitehybrid")
    model.key("attention.head_count_kv", [size.kv_heads if layer % 3 == 2 else 0 for layer in range(size.layers)])
    model.key("feed_forward_length", size.feed_forward)
    model.key("rope.dimension_count", size.head)
    _state_keys(model, inner=2 * size.embedding, state=64, rank=size.embedding // 32, groups=1)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        if layer % 3 == 2:
            model.attention(layer)
        else:
            _mamba2_block(model, layer, inner=2 * size.embedding, state=64, heads=size.embedding // 32)
        model.dense(layer)
    model.write()


def lfm2(path: Path, size: Sizes) -> None:
    """Short convolutions, and attention in every third block."""
    model = TinyModel(path, size, "lfm2")
    model.key("attention.head_count_kv", [size.kv_heads if layer % 3 == 2 else 0 for layer in range(size.layers)])
    model.key("feed_forward_length", size.feed_forward)
    model.key("shortconv.l_cache", 3)
    model.key("vocab_size", size.vocabulary)
    model.vocabulary()
    model.tensor("token_embd.weight", size.embedding, size.vocabulary, kind=GGMLQuantizationType.Q6_K)
    model.tensor("token_embd_norm.weight", size.embedding)
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "ffn_norm")
        if layer % 3 == 2:
            model.attention(layer, qk_norm=size.head)
        else:
            model.matrix(layer, "shortconv.conv", 3, size.embedding)
            model.matrix(layer, "shortconv.in_proj", size.embedding, 3 * size.embedding)
            model.matrix(layer, "shortconv.out_proj", size.embedding, size.embedding)
        model.dense(layer)
    model.write()


def nemotron_h(path: Path, size: Sizes) -> None:
    """Blocks of one kind each: a recurrent state, attention, or a feed-forward network that keeps nothing."""
    model = TinyModel(path, size, "nemotron_h")
    model.writer.add_float32("nemotron_h.attention.layer_norm_epsilon", 1e-5)
    model.key("attention.head_count_kv", [size.kv_heads if layer % 3 == 1 else 0 for layer in range(size.layers)])
    model.key("feed_forward_length", [size.feed_forward if layer % 3 == 2 else 0 for layer in range(size.layers)])
    _state_keys(model, inner=2 * size.embedding, state=64, rank=size.embedding // 32, groups=2)
    model.vocabulary()
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm")
        if layer % 3 == 1:
            model.attention(layer)
        elif layer % 3 == 0:
            _mamba2_block(model, layer, inner=2 * size.embedding, state=64, heads=size.embedding // 32, groups=2)
        else:
            model.matrix(layer, "ffn_up", size.embedding, size.feed_forward)
            model.matrix(layer, "ffn_down", size.feed_forward, size.embedding)
    model.write()


def qwen3next(path: Path, size: Sizes) -> None:
    """Three of four blocks keep the state of a gated delta net; all have experts."""
    model = _grouped(path, size, "qwen3next", head=128)
    _moe_keys(model)
    model.key("expert_shared_feed_forward_length", size.expert_feed_forward)
    state, keys, values = 64, 4, 8
    _state_keys(model, inner=state * values, state=state, rank=values, groups=keys)
    model.embedding()
    for layer in range(size.layers):
        model.norms(layer, "attn_norm", "post_attention_norm")
        if layer % 4 == 3:
            model.matrix(layer, "attn_q", size.embedding, 2 * size.heads * 128)
            for part in ("k", "v"):
                model.matrix(layer, f"attn_{part}", size.embedding, size.kv_heads * 128)
                model.vector(layer, f"attn_{'q' if part == 'v' else 'k'}_norm.weight", 128)
            model.matrix(layer, "attn_output", size.heads * 128, size.embedding)
        else:
            mixed = state * (2 * keys + values)
            model.matrix(layer, "attn_qkv", size.embedding, mixed)
            model.matrix(layer, "attn_gate", size.embedding, state * values)
            model.matrix(layer, "ssm_conv1d", 4, mixed)
            model.vector(layer, "ssm_dt.bias", values)
            model.vector(layer, "ssm_a", values)
            model.matrix(layer, "ssm_ba", size.embedding, 2 * values)
            model.vector(layer, "ssm_norm.weight", state)
            model.matrix(layer, "ssm_out", state * values, size.embedding)
        model.experts(layer)
        model.vector(layer, "ffn_gate_inp_shexp.weight", size.embedding)
        for part in ("gate", "up"):
            model.matrix(layer, f"ffn_{part}_shexp", size.embedding, size.expert_feed_forward)
        model.matrix(layer, "ffn_down_shexp", size.expert_feed_forward, size.embedding)
    model.write()


def bert(path: Path, size: Sizes) -> None:
    """An encoder: no cache at all."""
    model = TinyModel(path, size, "bert")
    model.key("feed_forward_length", size.feed_forward)
    model.writer.add_float32("bert.attention.layer_norm_epsilon", 1e-5)
    model.writer.add_bool("bert.attention.causal", False)
    model.writer.add_uint32("bert.pooling_type", 1)
    model.word_pieces()
    model.tensor("token_embd.weight", size.embedding, size.vocabulary, kind=GGMLQuantizationType.Q6_K)
    model.writer.add_tensor("token_types.weight", np.resize(_RANDOM_F32, (2, size.embedding)))
    model.writer.add_tensor("position_embd.weight", np.resize(_RANDOM_F32, (32768, size.embedding)))
    for part in ("weight", "bias"):
        model.tensor(f"token_embd_norm.{part}", size.embedding)
    for layer in range(size.layers):
        for part in ("q", "k", "v", "output"):
            model.matrix(layer, f"attn_{part}", size.embedding, size.embedding)
            model.vector(layer, f"attn_{part}.bias", size.embedding)
        model.matrix(layer, "ffn_up", size.embedding, size.feed_forward)
        model.vector(layer, "ffn_up.bias", size.feed_forward)
        model.matrix(layer, "ffn_down", size.feed_forward, size.embedding)
        model.vector(layer, "ffn_down.bias", size.embedding)
        for norm in ("attn_output_norm", "layer_output_norm"):
            for part in ("weight", "bias"):
                model.vector(layer, f"{norm}.{part}", size.embedding)
    model.write()


MODELS: dict[str, Callable[[Path, Sizes], None]] = {
    "llama": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3moe": qwen3moe,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "command-r": command_r,
    "cohere2": cohere2,
    "olmo2": olmo2,
    "gpt-oss": gpt_oss,
    "deepseek2": deepseek2,
    "mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "falcon-h1": falcon_h1,
    "granitehybrid": granite_hybrid,
    "lfm2": lfm2,
    "nemotron_h": nemotron_h,
    "qwen3next": qwen3next,
    "bert": bert,
}
"""What the table calls them, and how they are made."""


def make(name: str, folder: Path, size: Sizes = SMALL) -> Path:
    """Write the model once; returns its path."""
    path = folder / f"{name}{'' if size == SMALL else '-other'}.gguf"
    if not path.exists():
        MODELS[name](path, size)
    return path
