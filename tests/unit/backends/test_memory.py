"""The arithmetic of llama-server's memory, on numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.backends.memory import CACHE_BLOCKS, DEVICE_CONTEXT, LlamaMemory, llama_memory
from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes

MIB = 2**20


def layers(count: int, **parts: Any) -> tuple[LayerShape, ...]:
    return (LayerShape(**{"weights": Bytes(MIB), "k_row": 192, "v_row": 192, **parts}),) * count


def shape(*of: LayerShape, **parts: Any) -> ModelShape:
    """As SmolLM2-135M, but for its weights."""
    ordinary: dict[str, Any] = {
        "architecture": "llama",
        "context_train": 8192,
        "embedding": 576,
        "heads": 9,
        "vocabulary": 49152,
        "token_embedding": Bytes(30 * MIB),
        "other": Bytes(2304),
        "working_row": 6912,
        "attention_row": 2496,
    }
    return ModelShape(layers=of or layers(30), **{**ordinary, **parts})


@pytest.mark.parametrize(
    ("options", "mib"),
    [
        ({"context": 8192}, 180),
        ({"context": 8192, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}, 95.625),
        ({"context": 0}, 180),
        ({"context": 4096, "parallel": 4}, 90),
        ({"context": 4096, "parallel": 4, "kv_unified": True}, 90),
        ({"context": 1}, 5.625),
        ({"context": 8000, "parallel": 3}, 185.625),
        ({"context": 8000, "parallel": 3, "kv_unified": True}, 180),
    ],
)
def test_every_slot_gets_whole_cells(options: dict[str, Any], mib: float) -> None:
    assert llama_memory(shape(), **options).cache == mib * MIB


def sliding(**options: Any) -> float:
    """Cells of one sliding layer, over all sequences."""
    memory = llama_memory(shape(*layers(1, cache=LayerCache.SLIDING), window=1024), **options)
    return memory.cache / (2 * 192 * 2)


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({"context": 16384}, 1536),
        ({"context": 1024}, 1024),
        ({"context": 16384, "ubatch": 100}, 1280),
        ({"context": 16384, "parallel": 4}, 4 * 1536),
        ({"context": 16384, "parallel": 4, "kv_unified": True}, 4 * 1024 + 512),
        ({"context": 16384, "swa_full": True}, 16384),
        ({"context": 16384, "batch": 64}, 1280),
    ],
)
def test_sliding_layers_keep_their_window_and_a_batch(options: dict[str, Any], cells: int) -> None:
    assert sliding(**options) == cells


def test_states_are_kept_for_each_sequence_whatever_the_context() -> None:
    model = shape(*layers(2, cache=LayerCache.RECURRENT, k_row=0, v_row=0, state=1000))

    assert llama_memory(model, context=512, parallel=3).cache == llama_memory(model, context=8192, parallel=3).cache == 24000


def test_a_checkpoint_is_what_one_slot_would_lose() -> None:
    of = (*layers(1), *layers(1, cache=LayerCache.SLIDING), *layers(1, cache=LayerCache.RECURRENT, k_row=0, v_row=0, state=100))
    memory = llama_memory(shape(*of, window=1024), context=16384, parallel=2)

    assert memory.checkpoint == 1536 * 2 * 192 * 2 + 400


def test_values_lie_as_wide_as_the_widest_without_flash_attention() -> None:
    model = shape(*layers(1), *layers(1, v_row=64))
    with_it, without = (llama_memory(model, context=1024, flash_attention=on).cache for on in (True, False))

    assert without - with_it == 1024 * (192 - 64) * 2


def test_scores_of_all_heads_are_held_without_flash_attention() -> None:
    with_it, without = (llama_memory(shape(), context=8192, flash_attention=on).compute for on in (True, False))

    assert with_it / MIB == pytest.approx(8192 * 512 * 2 / MIB + 13.5)
    assert without > 9 * 8192 * 512 * 4


def test_embeddings_need_scores_for_a_whole_batch() -> None:
    plain, embedding = (llama_memory(shape(), context=4096, embeddings=on) for on in (False, True))

    assert embedding.compute - plain.compute > 80 * MIB
    assert embedding.output_buffer + embedding.output_growth == 512 * (49152 + 576) * 4
    assert plain.output_growth == 0


def test_an_encoder_keeps_nothing() -> None:
    model = shape(*layers(6, cache=LayerCache.NONE, k_row=0, v_row=0), causal=False, output=Bytes(0))
    memory = llama_memory(model, context=4096)

    assert memory.cache == 0
    assert not memory.tied


def test_unknown_cache_types_are_refused() -> None:
    with pytest.raises(KeyError):
        llama_memory(shape(), context=1024, cache_type_k="f8")


def test_without_gpu_layers_all_is_on_the_host() -> None:
    memory = llama_memory(shape(), context=4096)
    spread = memory.spread(gpu_layers=0)

    assert spread.host == memory.total
    assert spread.devices == (0,)


def test_with_all_layers_the_device_has_a_copy_of_a_tied_embedding() -> None:
    memory = llama_memory(shape(), context=4096)
    spread = memory.spread()

    assert memory.tied
    assert spread.devices == (sum(memory.per_layer) + memory.fixed_device,)
    assert spread.host == memory.host
    assert sum(memory.per_layer) == memory.weights + memory.cache
    assert memory.per_layer[-1] == 30 * MIB + 2304
    assert memory.host >= 30 * MIB


def test_the_output_layer_goes_first_then_the_last_blocks() -> None:
    sizes = [LayerShape(weights=Bytes(MIB << index), k_row=0, v_row=0, cache=LayerCache.NONE) for index in range(4)]
    memory = llama_memory(shape(*sizes, output=Bytes(5 * MIB), other=Bytes(0)), context=1024)
    fixed = memory.fixed_device

    assert memory.spread(gpu_layers=1).devices == (fixed + 5 * MIB,)
    assert memory.spread(gpu_layers=3).devices == (fixed + (5 + 8 + 4) * MIB,)
    assert memory.spread(gpu_layers=99).devices == memory.spread().devices


def test_shares_cut_the_row_of_layers() -> None:
    memory = llama_memory(shape(*layers(7), output=Bytes(MIB), other=Bytes(0)), context=1024)
    one = memory.blocks[0].total
    fixed = memory.fixed_device + 3 * memory.inputs

    assert memory.spread(shares=(1, 1)).devices == (fixed + 4 * one, fixed + 3 * one + MIB)
    assert memory.spread(shares=(3, 1)).devices == (fixed + 6 * one, fixed + one + MIB)


def test_experts_of_the_first_blocks_may_stay_on_the_host() -> None:
    memory = llama_memory(shape(*layers(4, experts=Bytes(10 * MIB))), context=1024)
    whole, some = memory.spread(), memory.spread(experts_on_host=3)

    assert whole.devices[0] - some.devices[0] == some.host - whole.host == 30 * MIB


def test_companions_are_added_to_the_first_device() -> None:
    eyes = ModelShape(architecture="clip", kind="mmproj", other=Bytes(7 * MIB), causal=False)
    adapter = ModelShape(architecture="llama", kind="adapter", other=Bytes(3 * MIB))
    draft = llama_memory(shape(*layers(2)), context=4096)
    bare = llama_memory(shape(), context=4096)
    full = llama_memory(shape(), context=4096, projector=eyes, adapters=[adapter], draft=draft)

    assert full.total - bare.total == 10 * MIB + draft.total
    assert full.spread().devices[0] - bare.spread().devices[0] == 10 * MIB + draft.spread().devices[0] - DEVICE_CONTEXT


shapes = st.builds(
    lambda kinds, window, output: shape(
        *(LayerShape(weights=Bytes(MIB), k_row=192, v_row=192, state=64, cache=kind) for kind in kinds),
        window=window,
        output=Bytes(output),
    ),
    st.lists(st.sampled_from(LayerCache), min_size=1, max_size=6),
    st.sampled_from([128, 1024]),
    st.sampled_from([0, MIB]),
)
options = st.fixed_dictionaries(
    {
        "context": st.integers(1, 20000),
        "parallel": st.integers(1, 9),
        "kv_unified": st.booleans(),
        "cache_type_k": st.sampled_from(sorted(CACHE_BLOCKS)),
        "cache_type_v": st.sampled_from(sorted(CACHE_BLOCKS)),
        "ubatch": st.integers(1, 4096),
        "flash_attention": st.booleans(),
        "embeddings": st.booleans(),
    }
)


@given(shapes, options, st.integers(0, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_nothing_is_lost_wherever_layers_go(model: ModelShape, chosen: dict[str, Any], gpu: int, shares: list[int]) -> None:
    memory = llama_memory(model, **chosen)
    spread = memory.spread(gpu_layers=gpu, shares=shares)

    assert spread.total >= memory.weights + memory.cache
    assert len(spread.devices) == len(shares)
    assert min(spread.host, *spread.devices, memory.compute - memory.inputs) >= 0


@given(shapes, options)
def test_more_context_never_takes_less(model: ModelShape, chosen: dict[str, Any]) -> None:
    def total(context: int) -> LlamaMemory:
        return llama_memory(model, **{**chosen, "context": context})

    assert total(chosen["context"]).total <= total(chosen["context"] + 256).total


def test_more_weights_are_more_memory() -> None:
    more = replace(shape(), layers=layers(31))

    assert llama_memory(more, context=4096).total > llama_memory(shape(), context=4096).total
