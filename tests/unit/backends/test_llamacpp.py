"""What the adapter reads out of llama-server's words, and what it tells it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.backends.base import NO_ENDPOINT, NOWHERE, fingerprint
from offloadd.backends.llamacpp import BACKEND, LlamaCppOptions
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import ExitKind, ExitStatus, ModelFacts, Placement
from offloadd.state.shape import LayerShape, ModelShape
from offloadd.units import Bytes

ENGINE = Engine(name=BackendName("llamacpp"), adapter="llamacpp", command=("llama-server",))
FACTS = ModelFacts(path="/models/m.gguf", size=Bytes(2**30), identity="1")
ONE, TWO = DeviceId(LOCAL, "GPU-1"), DeviceId(LOCAL, "GPU-2")
NVIDIA, AMD = DeviceKind.NVIDIA, DeviceKind.AMD


def spec(**fields: object) -> ModelSpec:
    return ModelSpec(**{"name": ModelName("m"), "source": "m.gguf", "backends": (ENGINE.name,)} | fields)  # type: ignore[arg-type]


def argv(placement: Placement, **fields: object) -> list[str]:
    return list(BACKEND.launch(ENGINE, spec(**fields), FACTS, placement, NO_ENDPOINT).argv)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Available devices:\n  (none)\n", frozenset()),
        ("Available devices:\n  CUDA0: NVIDIA GeForce RTX 3080 Ti (11909 MiB, 11650 MiB free)\n", frozenset({NVIDIA})),
        (
            "ggml_vulkan: Found 1\nAvailable devices:\n  Vulkan0: NVIDIA GeForce RTX 2060 (6144 MiB, 5136 MiB free)\n",
            frozenset({NVIDIA}),
        ),
        (
            "Available devices:\n  ROCm0: AMD Radeon (16 MiB, 5 MiB free)\n  CUDA0: NVIDIA (1 MiB, 1 MiB free)\n",
            frozenset({NVIDIA, AMD}),
        ),
        ("Available devices:\n  Vulkan0: NVIDIA A (1 MiB free)\n  Vulkan1: NVIDIA B (1 MiB free)\n", frozenset()),
        ("error: invalid argument: --list-devices\n", None),
        ("", None),
    ],
)
def test_the_gpus_that_it_can_use_are_read_from_its_own_list(text: str, kinds: frozenset[DeviceKind] | None) -> None:
    assert BACKEND.read_devices(text) == kinds


def test_on_the_cpu_it_sees_no_gpu() -> None:
    launch = BACKEND.launch(ENGINE, spec(), FACTS, NOWHERE, NO_ENDPOINT)
    assert (after("--device", list(launch.argv)), after("--n-gpu-layers", list(launch.argv))) == ("none", "0")
    assert launch.env["CUDA_VISIBLE_DEVICES"] == ""


def test_on_one_gpu_it_sees_that_one_and_puts_all_layers_there() -> None:
    placement = Placement(reserved={ONE: Bytes(1)}, gpus=(ONE,))
    launch = BACKEND.launch(ENGINE, spec(), FACTS, placement, NO_ENDPOINT)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert (after("--n-gpu-layers", list(launch.argv)), after("--split-mode", list(launch.argv))) == ("all", "none")


def test_a_part_of_the_layers_is_given_by_number() -> None:
    assert after("--n-gpu-layers", argv(Placement(reserved={}, gpus=(ONE,), split=(7,)))) == "7"


def test_a_division_is_given_layer_by_layer() -> None:
    words = argv(Placement(reserved={}, gpus=(TWO, ONE), split=(20, 13)))
    assert (after("--tensor-split", words), after("--split-mode", words)) == ("20,13", "layer")


def test_the_context_is_for_all_slots_together() -> None:
    assert after("--ctx-size", argv(NOWHERE, context=1000, parallel=3)) == str(1024 * 3)


def test_what_the_operator_appends_comes_last() -> None:
    assert argv(NOWHERE, args=("--verbose",))[-1] == "--verbose"


def test_typed_options_become_flags() -> None:
    words = argv(NOWHERE, options={"llamacpp": LlamaCppOptions(embeddings=True, cache_type_k="q8_0", lora=("/a", "/b"))})
    assert "--embeddings" in words
    assert after("--cache-type-k", words) == "q8_0"
    assert words.count("--lora") == 2


def test_a_fingerprint_changes_with_what_reaches_the_engine_and_with_nothing_else() -> None:
    plain = fingerprint(BACKEND, ENGINE, spec(), FACTS)
    same = [spec(priority=9), spec(aliases=("x",)), spec(drain_timeout=1.0), spec(pinned=True)]
    other = [
        spec(context=4096),
        spec(args=("-v",)),
        spec(env={"A": "b"}),
        spec(devices="cpu"),
        spec(gpu_layers=3),
        spec(partial=True),
    ]
    assert {fingerprint(BACKEND, ENGINE, one, FACTS) for one in same} == {plain}
    assert plain not in {fingerprint(BACKEND, ENGINE, one, FACTS) for one in other}


def test_a_program_for_another_processor_is_not_tried_again() -> None:
    cause = BACKEND.explain_exit(ExitStatus(signal=4), (), was_ready=False)
    assert (cause.kind, cause.permanent) == (ExitKind.NOT_STARTED, True)


@pytest.mark.parametrize(
    ("said", "kind", "why"),
    [
        ("CUDA error: an illegal memory access was encountered", ExitKind.CRASHED, "an illegal memory access was encountered"),
        ("CUDA error: out of memory", ExitKind.OUT_OF_MEMORY, "no more memory"),
    ],
)
@pytest.mark.parametrize("was_ready", [True, False])
def test_an_abort_for_what_the_gpu_did_is_told_from_others(said: str, kind: ExitKind, why: str, was_ready: bool) -> None:
    tail = (
        said,
        "  current device: 0, in function ggml_backend_cuda_synchronize at ggml-cuda.cu:2999",
        "ggml-cuda.cu:9: CUDA error",
    )
    cause = BACKEND.explain_exit(ExitStatus(signal=6), tail, was_ready=was_ready)
    assert (cause.kind, why in cause.message, cause.permanent) == (kind, True, False)
    other = BACKEND.explain_exit(ExitStatus(signal=9), tail, was_ready=was_ready)
    assert other.kind is ExitKind.KILLED, "somebody killed it"


def test_files_beside_the_model_are_found_as_the_model_is() -> None:
    one = spec(options={"llamacpp": LlamaCppOptions(mmproj="eyes.gguf", lora=("style.gguf",))})
    assert BACKEND.companions(one) == ("eyes.gguf", "style.gguf")
    beside = {name: ModelFacts(path=f"/models/{name}", identity="2") for name in BACKEND.companions(one)}
    words = list(BACKEND.launch(ENGINE, one, replace(FACTS, companions=beside), NOWHERE, NO_ENDPOINT).argv)
    assert (after("--mmproj", words), after("--lora", words)) == ("/models/eyes.gguf", "/models/style.gguf")


def test_files_beside_the_model_are_in_the_estimate() -> None:
    layer = LayerShape(weights=Bytes(2**20))
    shape = ModelShape(architecture="llama", embedding=64, feed_forward=128, heads=4, vocabulary=256, layers=(layer,))
    eyes = ModelFacts(path="/models/eyes.gguf", identity="2", shape=replace(shape, kind="mmproj", other=Bytes(2**30)))
    one = spec(options={"llamacpp": LlamaCppOptions(mmproj="eyes.gguf")})
    alone, both = replace(FACTS, shape=shape), replace(FACTS, shape=shape, companions={"eyes.gguf": eyes})
    assert BACKEND.estimate(one, both).total - BACKEND.estimate(one, alone).total >= 2**30


def test_a_header_that_cannot_be_read_leaves_the_size_of_the_file() -> None:
    assert BACKEND.estimate(spec(), FACTS).total > 2**30


def test_vram_in_the_config_wins() -> None:
    assert BACKEND.estimate(spec(vram=Bytes(5)), FACTS).total == 5
