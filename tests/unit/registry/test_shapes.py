"""What each architecture's header comes to: the rules that decide how much cache a layer needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.gguf import GgufHeader, Omitted
from offloadd.registry.readers.shapes import read_shape
from offloadd.registry.readers.tensors import Tensor
from offloadd.state.shape import LayerCache, ModelShape

FULL, SLIDING, RECURRENT, NONE = LayerCache.FULL, LayerCache.SLIDING, LayerCache.RECURRENT, LayerCache.NONE


def shape(arch: str, keys: Mapping[str, Any], *, tensors: tuple[Tensor, ...] = (), **more: Any) -> ModelShape:
    ordinary = {"block_count": 6, "embedding_length": 512, "attention.head_count": 8, "attention.head_count_kv": 2}
    own = {f"{arch}.{key}": value for key, value in {**ordinary, **keys}.items()}
    metadata = {"general.architecture": arch, **own, **{key.replace("__", "."): value for key, value in more.items()}}
    header = GgufHeader(
        path=Path("m.gguf"),
        version=3,
        little_endian=True,
        metadata=metadata,
        offsets=dict.fromkeys(metadata, 7),
        tensors=tensors,
        shards=(Path("m.gguf"),),
    )
    return read_shape(header)


def kinds(of: ModelShape) -> str:
    """One letter a layer: full, sliding, recurrent, none."""
    return "".join(layer.cache.value[0] for layer in of.layers)


SWA = {"attention.sliding_window": 1024}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention everywhere": ("llama", {}, "ffffff"),
    "an unknown architecture": ("from-the-future", SWA, "ffffff"),
    "every second slides": ("gemma2", SWA, "sfsfsf"),
    "every second slides, unsaid": ("gemma2", {}, "sfsfsf"),
    "all but every sixth": ("gemma3", SWA, "sssssf"),
    "no window, nothing slides": ("gemma3", {}, "ffffff"),
    "a window of 0": ("gemma3", {"attention.sliding_window": 0}, "ffffff"),
    "a period in the file": ("gemma3", {**SWA, "attention.sliding_window_pattern": 3}, "ssfssf"),
    "a list in the file": ("gemma3", {**SWA, "attention.sliding_window_pattern": (True,) * 5 + (False,)}, "sssssf"),
    "a list too short": ("gemma3", {**SWA, "attention.sliding_window_pattern": (True,)}, "sfffff"),
    "the first is full": ("cohere2moe", SWA, "fsssfs"),
    "only as the file lists": ("mimo2", {**SWA, "attention.sliding_window_pattern": (False, True) * 3}, "fsfsfs"),
    "a window that is not used": ("phi3", SWA, "ffffff"),
    "chunks": ("llama4", {}, "sssfss"),
    "slides only in its large form": ("exaone4", SWA, "ffffff"),
    "the large form": ("exaone4", {**SWA, "block_count": 64}, "sssf" * 16),
    "states only": ("mamba", {"ssm.state_size": 16, "ssm.inner_size": 1024, "ssm.conv_kernel": 4}, "rrrrrr"),
    "states where KV heads are 0": ("jamba", {"attention.head_count_kv": (0, 0, 2, 0, 0, 2)}, "rrfrrf"),
    "blocks of one kind": (
        "nemotron_h",
        {"attention.head_count_kv": (0, 2, 0, 0, 2, 0), "feed_forward_length": (0, 0, 99, 0, 0, 99)},
        "rfnrfn",
    ),
    "every fourth has attention": ("qwen3next", {"block_count": 8}, "rrrfrrrf"),
    "an interval in the file": ("qwen35", {"full_attention_interval": 2}, "rfrfrf"),
    "recurrent blocks listed": ("qwen35moe", {"attention.recurrent_layers": (True, False) * 3}, "rfrfrf"),
    "attention and state at once": ("falcon-h1", {"ssm.state_size": 16, "ssm.inner_size": 64, "ssm.conv_kernel": 4}, "ffffff"),
    "blocks without KV heads": ("deci", {"attention.head_count_kv": (2, 0, 2, 0, 2, 0)}, "fnfnfn"),
    "an encoder": ("bert", {}, "nnnnnn"),
    "a sliding encoder": ("modern-bert", SWA, "nnnnnn"),
    "blocks that guess ahead": ("glm4moe", {"nextn_predict_layers": 1}, "fffffn"),
    "upper blocks share": (
        "gemma4",
        {**SWA, "attention.shared_kv_layers": 2, "attention.sliding_window_pattern": (True, False) * 3},
        "sfsfnn",
    ),
    "blocks from the 21st share": ("gemma3n", {**SWA, "block_count": 30}, "ssssf" * 4 + "n" * 10),
    "attention slides": ("lfm2", {**SWA, "attention.head_count_kv": (0, 2) * 3, "shortconv.l_cache": 3}, "rsrsrs"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layer_keeps_what_its_architecture_says(case: str) -> None:
    arch, keys, expected = CASES[case]

    found = shape(arch, keys)

    assert kinds(found) == expected
    assert (found.window > 0) == ("s" in expected)
    assert all((layer.k_row > 0) == (layer.cache in (FULL, SLIDING)) for layer in found.layers)


def test_rows_are_kv_heads_times_head_size() -> None:
    plain, told = shape("llama", {}), shape("llama", {"attention.key_length": 128, "attention.value_length": 96})

    assert {(layer.k_row, layer.v_row) for layer in plain.layers} == {(128, 128)}
    assert {(layer.k_row, layer.v_row) for layer in told.layers} == {(256, 192)}


def test_kv_heads_are_the_heads_unless_said() -> None:
    found = shape("gpt2", {"attention.head_count_kv": None})

    assert found.layers[0].k_row == 512


def test_sliding_layers_may_have_heads_of_their_own_size() -> None:
    keys = {**SWA, "attention.sliding_window_pattern": (True, False) * 3, "attention.key_length_swa": 32}
    found = shape("gemma4", {**keys, "attention.value_length_swa": 32})

    assert [layer.k_row for layer in found.layers] == [64, 128] * 3


LATENT = {
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "attention.kv_lora_rank": 512,
    "rope.dimension_count": 64,
}


def test_latent_attention_keeps_one_row_and_no_values() -> None:
    layer = shape("deepseek2", LATENT).layers[0]

    assert (layer.k_row, layer.v_row) == (576, 0)


def test_old_files_of_such_models_keep_all_heads() -> None:
    old = {"attention.head_count_kv": 8, "attention.key_length": 192, "attention.value_length": 128}
    layer = shape("deepseek2", old).layers[0]

    assert (layer.k_row, layer.v_row) == (8 * 192, 8 * 128)


def test_sparse_attention_keeps_an_index_row_more() -> None:
    layer = shape("deepseek32", {**LATENT, "attention.indexer.key_length": 128}).layers[0]

    assert (layer.k_row, layer.v_row) == (576 + 128, 0)


STATES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mamba": ("mamba", {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 16}, 3 * 1024 + 16 * 1024),
    "mamba2": (
        "mamba2",
        {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 128, "ssm.group_count": 2},
        3 * (1024 + 2 * 2 * 128) + 128 * 1024,
    ),
    "rwkv": ("rwkv7", {"wkv.head_size": 64}, 2 * 512 + 512 * 64),
    "rwkv, one shift": ("rwkv6qwen2", {"wkv.head_size": 64, "token_shift_count": 1}, 512 + 512 * 64),
    "short convolution": ("lfm2", {"shortconv.l_cache": 3, "attention.head_count_kv": 0}, 2 * 512),
    "delta attention": (
        "kimi-linear",
        {"kda.head_dim": 128, "ssm.conv_kernel": 4, "attention.head_count_kv": 0},
        3 * 3 * 8 * 128 + 8 * 128 * 128,
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_have_a_fixed_size(case: str) -> None:
    arch, keys, expected = STATES[case]

    assert {layer.state for layer in shape(arch, keys).layers} == {expected}


def test_tensors_are_counted_where_they_belong() -> None:
    sizes = {
        "token_embd.weight": 1000,
        "output.weight": 200,
        "output_norm.weight": 4,
        "rope_freqs.weight": 3,
        "blk.0.attn_q.weight": 10,
        "blk.0.ffn_gate_inp.weight": 1,
        "blk.1.ffn_up_exps.weight": 70,
        "blk.1.ffn_gate_up_exps.weight": 30,
        "blk.1.ffn_up_shexp.weight": 5,
    }
    found = shape("llama", {"block_count": 2}, tensors=tuple(Tensor(name, 2 * size, size, 2) for name, size in sizes.items()))

    assert (found.token_embedding, found.output, found.other) == (1000, 200, 7)
    assert [(layer.weights, layer.experts) for layer in found.layers] == [(11, 0), (5, 100)]
    assert found.weights == sum(sizes.values())
    assert found.parameters == 2 * sum(sizes.values())
    assert found.vocabulary == 1000


def test_names_and_numbers_for_people() -> None:
    more = {
        "general__name": "Tiny",
        "general__file_type": 15,
        "tokenizer__ggml__tokens": Omitted(32000),
        "tokenizer__chat_template": "{{ }}",
    }
    found = shape("llama", {"context_length": 8192, "feed_forward_length": 1408}, **more)

    assert (found.name, found.quantization, found.vocabulary) == ("Tiny", "Q4_K_M", 32000)
    assert (found.context_train, found.embedding, found.feed_forward, found.heads) == (8192, 512, 1408, 8)
    assert found.chat_template
    assert found.causal


def test_projectors_and_adapters_are_whole() -> None:
    tensor = Tensor("v.blk.0.attn_q.weight", 10, 20, 10)
    eyes = {"vision.block_count": 1, "vision.image_size": 448, "vision.patch_size": 14, "vision.embedding_length": 64}
    projector = shape("clip", eyes, tensors=(tensor,))
    adapter = shape("llama", {}, tensors=(Tensor("blk.0.attn_q.weight.lora_a", 5, 10, 5),), general__type="adapter")

    assert (projector.kind, projector.weights, projector.context_train, projector.layers) == ("mmproj", 20, 1024, ())
    assert (adapter.kind, adapter.weights) == ("adapter", 10)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"block_count": 5000}, "5000 blocks are more"),
        ({"block_count": -1}, "block_count: is out of all proportion"),
        ({"attention.head_count": 2**62}, "attention.head_count: is out of all proportion"),
        ({"attention.head_count_kv": (1, -5)}, "attention.head_count_kv: is out of all proportion"),
        ({"block_count": 1}, "1 blocks, yet there are tensors of block 3"),
    ],
)
def test_impossible_numbers_are_refused_with_their_place(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(HeaderError, match=problem) as caught:
        shape("llama", keys, tensors=(Tensor("blk.3.attn_q.weight", 1, 4, 1),))

    assert caught.value.offset == 7


def test_values_of_another_type_count_as_absent() -> None:
    found = shape("llama", {"attention.key_length": "many", "attention.sliding_window": 1.5, "context_length": Omitted(3)})

    assert found.layers[0].k_row == 128
    assert found.context_train == 0
