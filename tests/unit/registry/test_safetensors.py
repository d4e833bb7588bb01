"""Folders in Hugging Face's layout."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from offloadd.registry.readers import read_model
from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.safetensors import read_tensors
from offloadd.state.shape import LayerCache

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def header(tensors: dict[str, tuple[str, list[int], int]], **extra: Any) -> bytes:
    entries, at = dict(extra), 0
    for name, (kind, sizes, size) in tensors.items():
        entries[name] = {"dtype": kind, "shape": sizes, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


WEIGHTS = {
    "model.embed_tokens.weight": ("BF16", [100, 64], 12800),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", [64, 64], 8192),
    "model.layers.1.mlp.experts.3.up_proj.weight": ("F8_E4M3", [128, 64], 8192),
    "model.layers.1.mlp.shared_experts.up_proj.weight": ("BF16", [2, 64], 256),
    "model.norm.weight": ("BF16", [64], 128),
    "lm_head.weight": ("BF16", [100, 64], 12800),
}


def folder(path: Path, config: dict[str, Any], tensors: dict[str, tuple[str, list[int], int]] = WEIGHTS) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(header(tensors, __metadata__={"format": "pt", "note": "} tricky {"}))
    return path


def test_weights_come_from_the_headers_and_rows_from_the_config(tmp_path: Path) -> None:
    found = read_model(folder(tmp_path, CONFIG))

    assert (found.token_embedding, found.output, found.other) == (12800, 12800, 128)
    assert [(layer.weights, layer.experts) for layer in found.layers] == [(8192, 0), (256, 8192)]
    assert {(layer.cache, layer.k_row, layer.v_row) for layer in found.layers} == {(LayerCache.FULL, 32, 32)}
    assert (found.architecture, found.context_train, found.vocabulary, found.quantization) == ("llama", 2048, 100, "bfloat16")
    assert found.weights == sum(size for _, _, size in WEIGHTS.values())


RULES: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "head_dim wins": ({"head_dim": 128}, "ff", 256, 256),
    "no KV heads said": ({"num_key_value_heads": None}, "ff", 64, 64),
    "latent": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "ff", 576, 0),
    "layers named": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}, "sf", 32, 32),
    "named, no window": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": None}, "ff", 32, 32),
    "gemma2": ({"model_type": "gemma2", "sliding_window": 16}, "sf", 32, 32),
    "a pattern": ({"sliding_window": 16, "sliding_window_pattern": 2}, "sf", 32, 32),
    "all slide": ({"model_type": "mistral", "sliding_window": 16}, "ss", 32, 32),
    "a window switched off": ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, "ff", 32, 32),
    "from a layer on": (
        {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
        "fs",
        32,
        32,
    ),
    "jamba": ({"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16}, "rf", 32, 32),
    "letters": ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*", "ssm_state_size": 16}, "rf", 32, 32),
    "a language model inside": ({"text_config": {"head_dim": 8}}, "ff", 16, 16),
    "encoder": ({"model_type": "bert"}, "nn", 0, 0),
}


@pytest.mark.parametrize("case", RULES)
def test_the_config_says_what_each_layer_keeps(tmp_path: Path, case: str) -> None:
    change, kinds, k_row, v_row = RULES[case]

    found = read_model(folder(tmp_path, {**CONFIG, **change}))

    assert "".join(layer.cache.value[0] for layer in found.layers) == kinds
    attending = {(layer.k_row, layer.v_row) for layer in found.layers if layer.cache in (LayerCache.FULL, LayerCache.SLIDING)}
    assert attending <= {(k_row, v_row)}
    assert all((layer.state > 0) == (layer.cache == LayerCache.RECURRENT) for layer in found.layers)


def test_shards_of_the_index_are_read_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = list(WEIGHTS)
    for number, some in enumerate((names[:3], names[3:]), start=1):
        (tmp_path / f"model-{number}.safetensors").write_bytes(header({name: WEIGHTS[name] for name in some}))
    (tmp_path / "consolidated.safetensors").write_bytes(header(WEIGHTS))
    places = {name: f"model-{1 if name in names[:3] else 2}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    assert read_model(tmp_path).weights == sum(size for _, _, size in WEIGHTS.values())

    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(HeaderError, match=r"model-2\.safetensors"):
        read_model(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder(tmp_path, CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other/model.safetensors"}}')

    with pytest.raises(HeaderError, match="beside it"):
        read_model(tmp_path)


def entry(name: str = "t", **change: Any) -> bytes:
    text = json.dumps({name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


HOSTILE = {
    "a header of 18446744073709551615 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of 200 bytes: 2 are left": struct.pack("<Q", 200) + b"{}",
    "a header of 0 bytes": bytes(16),
    "not a JSON object": struct.pack("<Q", 2) + b"[]",
    "not JSON, or not a list": struct.pack("<Q", 8) + b'{"a": 1}',
    "8 bytes are expected": b"1234",
    "something follows": struct.pack("<Q", len(entry()) - 24 + 1) + entry()[8:-16] + b"x" + bytes(16),
    "not within the 16": entry(data_offsets=[0, 17]),
    "bytes 9 to 8": entry(data_offsets=[9, 8]),
    "dimensions are impossible": entry(shape=[-1]),
    "are not what its shape": entry(shape=[2, 3]),
    "t: ": entry(shape="wide"),
    "Expected `int`": entry(shape=[1.5]),
    "t: Integer": entry(shape=[2**80]),
    "a name is longer": entry("t" * 2000),
}


@pytest.mark.parametrize("problem", HOSTILE)
def test_hostile_headers_are_refused_with_file_and_offset(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[problem])

    with pytest.raises(HeaderError) as caught:
        list(read_tensors(path))

    assert str(path) in caught.value.message
    assert "at byte" in caught.value.message
    if problem != "t: Integer":  # how a number too large is put depends on the decoder's version
        assert problem in caught.value.message


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", '"x', "{" + " " * 5_000_000, '{"num_hidden_layers": 5000}']
)
def test_hostile_configs_are_refused(tmp_path: Path, text: str) -> None:
    folder(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(HeaderError, match=r"config\.json"):
        read_model(tmp_path)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(HeaderError, match=r"no \*\.safetensors"):
        read_model(tmp_path)
