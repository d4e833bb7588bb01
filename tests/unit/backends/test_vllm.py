"""What the adapter tells vLLM, takes of the ledger, and reads out of its words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.backends.base import NO_ENDPOINT, NOWHERE, fingerprint
from offloadd.backends.hub_memory import DEVICE_CONTEXT, GIB, hub_memory
from offloadd.backends.vllm import BACKEND
from offloadd.backends.vllm_options import VllmOptions
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, DeviceId, ModelName
from offloadd.state.launch import Endpoint, ExitKind, ExitStatus, Health, ModelFacts, Placement, ProbeReply, VramEstimate
from offloadd.state.shape import LayerCache, LayerShape, ModelShape
from offloadd.units import Bytes

MIB = 2**20
ENGINE = Engine(name=BackendName("vllm"), adapter="vllm", command=("vllm", "serve"))
ONE, TWO = DeviceId(LOCAL, "GPU-1"), DeviceId(LOCAL, "GPU-2")
CARD = Bytes(24 * GIB)
LAYER = LayerShape(weights=Bytes(400 * MIB), k_row=1024, v_row=1024)
SHAPE = ModelShape(
    architecture="llama",
    embedding=4096,
    feed_forward=14336,
    heads=32,
    vocabulary=128_000,
    context_train=131_072,
    layers=(LAYER,) * 32,
)
FACTS = ModelFacts(path="org/model", size=Bytes(13 * GIB), identity="1", shape=SHAPE)


def spec(options: VllmOptions | None = None, **fields: object) -> ModelSpec:
    given = {"vllm": options} if options else {}
    base = {"name": ModelName("m"), "source": "org/model", "backends": (ENGINE.name,), "options": given}
    return ModelSpec(**base | fields)  # type: ignore[arg-type]


def on(*sizes: int, elastic: bool = True) -> Placement:
    gpus = (ONE, TWO)[: len(sizes)]
    reserved = dict(zip(gpus, map(Bytes, sizes), strict=True))
    return Placement(
        reserved=reserved, gpus=gpus, whole=dict.fromkeys(gpus, CARD), used=dict.fromkeys(gpus, Bytes(0)), elastic=elastic
    )


def argv(placement: Placement = NOWHERE, options: VllmOptions | None = None, **fields: object) -> list[str]:
    return list(BACKEND.launch(ENGINE, spec(options, **fields), FACTS, placement, NO_ENDPOINT).argv)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("promised", [2 * GIB, 6 * GIB, 10 * GIB + 12345, 23 * GIB])
def test_its_share_of_the_card_is_what_was_promised_and_no_more(promised: int) -> None:
    share = float(after("--gpu-memory-utilization", argv(on(promised))))
    assert share * CARD + DEVICE_CONTEXT <= promised
    assert share * CARD + DEVICE_CONTEXT > promised - CARD / 5000


def test_an_exact_cache_still_comes_with_the_share_since_the_check_at_the_start_uses_it() -> None:
    words = argv(on(6 * GIB), VllmOptions(kv_cache=Bytes(GIB)))
    assert after("--kv-cache-memory-bytes", words) == str(GIB)
    assert float(after("--gpu-memory-utilization", words)) < 0.25


def test_on_two_cards_it_is_told_so_and_takes_the_lesser_share_of_both() -> None:
    words = argv(on(8 * GIB, 6 * GIB))
    assert after("--tensor-parallel-size", words) == "2"
    assert float(after("--gpu-memory-utilization", words)) * CARD <= 6 * GIB
    launch = BACKEND.launch(ENGINE, spec(), FACTS, on(8 * GIB, 8 * GIB), NO_ENDPOINT)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"


def test_on_the_cpu_it_gets_whole_gibibytes_of_ram_for_its_cache() -> None:
    launch = BACKEND.launch(ENGINE, spec(context=1024, parallel=1), FACTS, NOWHERE, NO_ENDPOINT)
    assert launch.env["VLLM_TARGET_DEVICE"] == "cpu"
    assert launch.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    # An empty list of cards has it load kernels for cards that never come; the real one then died of its first request.
    assert "CUDA_VISIBLE_DEVICES" not in launch.env
    assert "--gpu-memory-utilization" not in launch.argv


def test_it_listens_on_loopback_under_our_name_and_reports_to_nobody() -> None:
    launch = BACKEND.launch(ENGINE, spec(), FACTS, NOWHERE, Endpoint(host="127.0.0.1", port=7, key="k"))
    words = list(launch.argv)
    assert words[:3] == ["vllm", "serve", "org/model"]
    assert (after("--host", words), after("--port", words), after("--served-model-name", words)) == ("127.0.0.1", "7", "m")
    assert launch.env["VLLM_API_KEY"] == "k"
    assert "k" not in words
    assert launch.env["DO_NOT_TRACK"] == launch.env["VLLM_NO_USAGE_STATS"] == "1"
    assert launch.env["VLLM_HOST_IP"] == "127.0.0.1"
    assert "VLLM_SERVER_DEV_MODE" not in launch.env


def test_a_context_beyond_the_model_s_own_is_not_asked_for() -> None:
    small = replace(FACTS, shape=replace(SHAPE, context_train=512))
    words = list(BACKEND.launch(ENGINE, spec(), small, NOWHERE, NO_ENDPOINT).argv)
    assert after("--max-model-len", words) == "512"
    assert after("--max-num-seqs", words) == "4"


def test_typed_options_become_flags_and_args_come_last() -> None:
    options = VllmOptions(eager=True, tool_call_parser="hermes", kv_cache_dtype="fp8", lora=("a=/x",), cpu_offload=Bytes(2 * GIB))
    words = argv(NOWHERE, options, args=("--seed", "1"))
    assert {"--enforce-eager", "--enable-auto-tool-choice", "--enable-lora"} <= set(words)
    assert after("--tool-call-parser", words) == "hermes"
    assert after("--kv-cache-dtype", words) == "fp8"
    assert after("--cpu-offload-gb", words) == "2.000"
    assert words[-2:] == ["--seed", "1"]
    assert not {"--dtype", "--runner", "--quantization"} & set(words)


def test_the_fingerprint_follows_options_and_not_the_key_of_a_launch() -> None:
    plain = fingerprint(BACKEND, ENGINE, spec(), FACTS)
    assert plain != fingerprint(BACKEND, ENGINE, spec(VllmOptions(eager=True)), FACTS)
    assert plain != fingerprint(BACKEND, ENGINE, spec(VllmOptions(kv_cache=Bytes(GIB))), FACTS)  # told on a GPU only
    assert plain == fingerprint(BACKEND, ENGINE, spec(aliases=("x",)), FACTS)


# --- memory ---


def test_the_estimate_is_the_sum_of_its_parts() -> None:
    estimate = BACKEND.estimate(spec(context=8192, parallel=4), FACTS)
    assert estimate is not None
    cache = 32 * 2048 * 2 * 8192 * 4
    assert estimate.total > SHAPE.weights + cache
    assert estimate.total < SHAPE.weights + cache + 4 * GIB
    assert estimate.elastic
    eager = BACKEND.estimate(spec(VllmOptions(eager=True), context=8192, parallel=4), FACTS)
    assert eager is not None
    assert eager.total == estimate.total - GIB


def test_vram_in_the_config_wins_and_is_divided_evenly() -> None:
    estimate = BACKEND.estimate(spec(vram=Bytes(10 * GIB)), FACTS)
    assert estimate is not None
    assert (estimate.total, estimate.even[2]) == (10 * GIB, 5 * GIB)


def test_a_hub_id_that_is_not_on_disk_has_no_estimate_unless_vram_says_it() -> None:
    nothing = ModelFacts(path="org/model", size=Bytes(0))
    assert BACKEND.estimate(spec(), nothing) is None
    assert BACKEND.estimate(spec(vram=Bytes(GIB)), nothing) is not None


def test_parts_are_divided_over_as_many_cards_as_divide_the_heads() -> None:
    memory = hub_memory(SHAPE, context=8192, parallel=1, batch=2048)
    assert set(memory.even) == {2, 4, 8, 16}
    assert memory.on_each(2) < memory.total
    assert hub_memory(replace(SHAPE, heads=7), context=8192, parallel=1, batch=2048).even.keys() == {7}


def test_latent_attention_s_cache_is_not_divided() -> None:
    latent = replace(SHAPE, layers=(LayerShape(weights=Bytes(MIB), k_row=576, v_row=0),) * 32)
    memory = hub_memory(latent, context=8192, parallel=4, batch=2048)
    assert memory.on_each(8) > memory.cache
    # Grouped heads can be shared out only as far as there are any.
    assert hub_memory(SHAPE, context=8192, parallel=4, batch=2048).cache_parts == 8


def test_sliding_and_recurrent_layers_keep_what_they_keep() -> None:
    def cache(**kind: object) -> int:
        layers = (LayerShape(**{"weights": Bytes(0), "k_row": 128, "v_row": 128} | kind),)  # type: ignore[arg-type]
        return hub_memory(replace(SHAPE, window=1024, layers=layers), context=32768, parallel=2, batch=2048).cache

    assert cache() == 32768 * 2 * 256 * 2
    assert cache(cache=LayerCache.SLIDING) == 3072 * 2 * 256 * 2
    assert cache(cache=LayerCache.RECURRENT, k_row=0, v_row=0, state=1000) == 1000 * 4 * 2
    assert cache(cache=LayerCache.NONE) == 0


# --- what it says ---


def test_ready_is_health_then_the_list_then_a_token() -> None:
    probes = BACKEND.probes(spec())
    assert [(probe.path, bool(probe.body)) for probe in probes.readiness] == [
        ("/health", False),
        ("/v1/models", False),
        ("/v1/completions", True),
    ]
    # /health is 200 also when its engine is stuck.
    assert probes.liveness.path == "/v1/completions"
    assert BACKEND.probes(spec(VllmOptions(runner="pooling"))).readiness[-1].path == "/v1/embeddings"


@pytest.mark.parametrize(
    ("path", "reply", "health"),
    [
        ("/health", ProbeReply(status=None), Health.SILENT),
        ("/health", ProbeReply(status=200), Health.READY),
        ("/health", ProbeReply(status=503), Health.SILENT),
        ("/v1/models", ProbeReply(status=200, body=b'{"data":[{"id":"m"}]}'), Health.READY),
        ("/v1/models", ProbeReply(status=200, body=b'{"data":[{"id":"other"}]}'), Health.SILENT),
        ("/v1/models", ProbeReply(status=200, body=b"<html>"), Health.SILENT),
        ("/v1/completions", ProbeReply(status=500), Health.SILENT),
        ("/v1/completions", ProbeReply(status=200), Health.READY),
    ],
)
def test_probes(path: str, reply: ProbeReply, health: Health) -> None:
    assert BACKEND.read_probe(spec(), path, reply) is health


@pytest.mark.parametrize(
    ("line", "kind", "said", "permanent"),
    [
        ("vllm: error: unrecognized arguments: --frobnicate", ExitKind.BAD_OPTION, "does not know --frobnicate", True),
        ("OSError: [Errno 98] Address already in use", ExitKind.PORT_TAKEN, "port", False),
        (
            "ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory utilization",
            ExitKind.OUT_OF_MEMORY,
            "only 3.1 were free on cuda:0",
            False,
        ),
        ("No available memory for the cache blocks. Try increasing", ExitKind.OUT_OF_MEMORY, "no memory for the KV cache", True),
        (
            "cache memory (0.50 GiB). Based on the available memory, the estimated maximum model length is 4096. Try",
            ExitKind.OUT_OF_MEMORY,
            "4096 tokens only",
            True,
        ),
        ("Error in memory profiling. Initial free memory 20", ExitKind.OUT_OF_MEMORY, "another process freed", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", ExitKind.OUT_OF_MEMORY, "not enough memory", False),
        ("huggingface_hub.errors.HFValidationError: Repo id must be in the form", ExitKind.BAD_MODEL, "Repo id must be", True),
        ("Value error, Model architectures ['NoSuchForCausalLM'] are not supported for now.", ExitKind.BAD_MODEL, "NoSuch", True),
        ("OSError: It looks like the config file at '/m.gguf' is not a valid JSON file.", ExitKind.BAD_MODEL, "/m.gguf", True),
        (
            "Value error, User-specified max_model_len (999999) is greater than the derived max_model_len (max_position=512",
            ExitKind.BAD_OPTION,
            "context 999999 is more than the model's own 512",
            True,
        ),
        ("Value error, Sleep mode is not supported on current platform.", ExitKind.BAD_OPTION, "Sleep mode", True),
        (
            "Available memory on node 0 (9.39/10.71 GiB) on kv cache allocation is less than requested memory for kv (500.0 GiB).",
            ExitKind.OUT_OF_HOST_MEMORY,
            "not enough RAM",
            False,
        ),
        ("RuntimeError: Engine core initialization failed. See root cause above.", ExitKind.CRASHED, "failed to start", False),
    ],
)
def test_failed_starts_are_explained(line: str, kind: ExitKind, said: str, permanent: bool) -> None:
    cause = BACKEND.explain_exit(ExitStatus(code=1), ["before", line, "after"], was_ready=False)
    assert (cause.kind, cause.permanent) == (kind, permanent)
    assert said in cause.message


def test_an_info_line_after_a_good_start_is_no_failure() -> None:
    line = "Free memory on device (20.1/23.6 GiB) on startup. Desired GPU memory utilization is (0.5, 11.8 GiB)."
    cause = BACKEND.explain_exit(ExitStatus(code=1), [line], was_ready=False)
    assert cause.kind is ExitKind.CRASHED


def test_an_end_with_0_that_nobody_asked_for_is_the_engine_s_death() -> None:
    cause = BACKEND.explain_exit(ExitStatus(code=0), ["INFO: Shutting down"], was_ready=True)
    assert cause.kind is ExitKind.CRASHED
    assert "engine process died" in cause.message


def test_it_can_sleep_only_where_it_is_told_to_and_on_gpus() -> None:
    def launched(placement: Placement, options: VllmOptions | None = None) -> tuple[bool, str]:
        made = BACKEND.launch(ENGINE, spec(options), FACTS, placement, NO_ENDPOINT)
        return "--enable-sleep-mode" in made.argv, made.env.get("VLLM_SERVER_DEV_MODE", "")

    assert launched(on(10 * GIB)) == (False, "")
    assert launched(on(10 * GIB), VllmOptions(sleep=1)) == (True, "1")
    assert launched(NOWHERE, VllmOptions(sleep=1)) == (False, "")  # its CPU build refuses the flag
    assert BACKEND.naps(spec()) is None
    assert BACKEND.api(spec()).closed == frozenset()
    assert "collective_rpc" in BACKEND.api(spec(VllmOptions(sleep=2))).closed


def test_how_deep_it_sleeps_is_a_part_of_its_launch() -> None:
    prints = [fingerprint(BACKEND, ENGINE, spec(VllmOptions(sleep=level)), FACTS) for level in (0, 1, 2)]
    assert len(set(prints)) == 3
    assert prints[0] == fingerprint(BACKEND, ENGINE, spec(), FACTS)


def needed(options: VllmOptions, facts: ModelFacts = FACTS, **fields: object) -> VramEstimate:
    found = BACKEND.estimate(spec(options, **fields), facts)
    assert found is not None
    return found


def test_light_sleep_keeps_ram_for_its_weights_from_the_start() -> None:
    awake, light, deep = (needed(VllmOptions(sleep=level)) for level in (0, 1, 2))
    assert (awake.asleep, light.asleep, deep.asleep) == (None, 2 * GIB, 2 * GIB)
    assert light.host == awake.host + SHAPE.weights
    assert (deep.host, deep.total) == (awake.host, awake.total)
    eager = needed(VllmOptions(sleep=2, eager=True))
    told = needed(VllmOptions(sleep=2, asleep=Bytes(GIB // 2)), vram=Bytes(8 * GIB))
    unknown = needed(VllmOptions(sleep=1), replace(FACTS, shape=None), vram=Bytes(8 * GIB))
    assert (eager.asleep, told.asleep) == (GIB, GIB // 2)
    assert unknown.host == 10 * GIB


def test_deep_sleep_has_its_weights_read_again() -> None:
    light, deep = BACKEND.naps(spec(VllmOptions(sleep=1))), BACKEND.naps(spec(VllmOptions(sleep=2)))
    assert light
    assert deep
    assert [probe.path for probe in (*light.sleep, *light.wake)] == ["/sleep?level=1&mode=wait", "/wake_up"]
    assert [probe.path for probe in deep.wake] == ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
    assert deep.wake[1].body == b'{"method": "reload_weights"}'
    assert all(probe.body for probe in (*light.sleep, *light.wake, *deep.wake))  # a probe without one is a GET


@pytest.mark.parametrize(
    ("status", "body", "asleep"),
    [
        (200, b'{"is_sleeping":true}', True),
        (200, b'{"is_sleeping":false}', False),
        (404, b'{"detail":"Not Found"}', None),
        (200, b'{"is_sleeping":"yes"}', None),
        (200, b"[]", None),
        (200, b"{", None),
        (None, b"", None),
    ],
)
def test_whether_it_sleeps_is_read_off_its_answer(status: int | None, body: bytes, asleep: bool | None) -> None:
    assert BACKEND.read_nap(ProbeReply(status=status, body=body)) is asleep


def test_an_adapter_of_the_models_own_name_is_what_clients_get_and_takes_memory_of_its_own() -> None:
    options = VllmOptions(lora=("m=/loras/m", "other=org/other"), lora_rank=32)
    words = argv(options=options)
    assert after("--served-model-name", words) == "m:base"  # or the base would answer to the name
    at = words.index("--lora-modules")
    assert words[at - 1 : at + 3] == ["--enable-lora", "--lora-modules", "m=/loras/m", "other=org/other"]
    assert after("--max-lora-rank", words) == "32"
    assert BACKEND.companions(spec(options)) == ("/loras/m",)
    assert after("--served-model-name", argv(options=VllmOptions(lora=("other=/x",)))) == "m"
    adapter = ModelFacts(path="/loras/m", shape=ModelShape(architecture="", kind="adapter", rank=16, other=Bytes(50 * MIB)))
    alone, over = (BACKEND.estimate(spec(options), replace(FACTS, companions=beside)) for beside in ({}, {"/loras/m": adapter}))
    assert alone is not None
    assert over is not None
    assert over.total - alone.total == 200 * MIB  # room for twice its rank, and for modules that it leaves alone


def test_its_sockets_lie_in_the_launchs_own_folder_unless_it_runs_in_a_container_or_the_config_says_otherwise() -> None:
    at = Endpoint(host="127.0.0.1", port=41000, folder="/var/lib/ml-offload/tmp/0123456789ab")

    def base(engine: Engine = ENGINE, **changes: object) -> str | None:
        return BACKEND.launch(engine, spec(**changes), FACTS, on(8 * GIB), at).env.get("VLLM_RPC_BASE_PATH")

    assert base() == at.folder
    assert base(env={"VLLM_RPC_BASE_PATH": "/run/x"}) == "/run/x"
    assert base(replace(ENGINE, command=("podman", "run", "vllm", "serve"))) is None
