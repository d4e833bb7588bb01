"""llama.cpp's `llama-server`: one process, one model, GGUF files. Facts from builds b10434 and b11434."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offloadd.backends.base import listed, read_json, visible
from offloadd.backends.llamacpp_failures import explain_exit
from offloadd.backends.memory import LlamaMemory, llama_memory
from offloadd.backends.words import fill
from offloadd.state.desired import BackendKind, BackendOptions, Engine, ModelSpec
from offloadd.state.found import Found
from offloadd.state.ids import DeviceKind
from offloadd.state.launch import (
    Endpoint,
    EngineApi,
    EngineLoad,
    ExitCause,
    ExitStatus,
    Health,
    Launch,
    ModelFacts,
    Placement,
    Probe,
    ProbeReply,
    Probes,
    SourceNeed,
    VramEstimate,
)
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes, Seconds, format_bytes

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]

_MIB = 2**20
_CELLS = 256
"""llama-server rounds the context of a slot up to a multiple of this."""
_GPU_KINDS = (
    (re.compile(r"^[^\S\n]*CUDA\d+:", re.MULTILINE), DeviceKind.NVIDIA),
    (re.compile(r"^[^\S\n]*(ROCm|HIP)\d+:", re.MULTILINE), DeviceKind.AMD),
)
_VULKAN_KINDS = (
    (re.compile(r"^[^\S\n]*Vulkan\d+: .*(NVIDIA|GeForce)", re.MULTILINE), DeviceKind.NVIDIA),
    (re.compile(r"^[^\S\n]*Vulkan\d+: .*(AMD|Radeon)", re.MULTILINE), DeviceKind.AMD),
)
_CHECKPOINTS = 4
_BATCH = 2048
_UBATCH = 512
"""llama-server's own defaults, in tokens."""
_MARGIN = Bytes(512 * _MIB)
_MARGIN_SHARE = 0.15
"""What is added to a file's size where its header cannot be read."""
_PROGRAM = Bytes(64 * _MIB)
"""The program itself, its threads and its HTTP buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppOptions(BackendOptions):
    """Options of `llama-server` that have a type of their own; anything else goes into `args`."""

    flash_attention: Literal["auto", "on", "off"] = "auto"
    """`--flash-attn`; a quantized `cache_type_v` needs it."""
    cache_type_k: CacheType = "f16"
    """Type of the K half of the KV cache."""
    cache_type_v: CacheType = "f16"
    """Type of the V half of the KV cache."""
    batch: int | None = None
    """Logical batch, in tokens (`--batch-size`)."""
    ubatch: int | None = None
    """Physical batch, in tokens (`--ubatch-size`); drives the size of the compute buffer."""
    threads: int | None = None
    """CPU threads for generation."""
    cache_ram: Bytes = Bytes(512 * _MIB)
    """Host RAM for cached prompts. llama-server's own default of 8 GiB would not be in anybody's budget."""
    kv_unified: bool = False
    """One KV cache shared by all sequences, each of which may then grow to the whole of it."""
    embeddings: bool = False
    """Serve `/v1/embeddings`."""
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    """How token vectors become one embedding; default: as the model says."""
    reranking: bool = False
    """Serve `/v1/rerank`."""
    mmproj: str | None = None
    """The multimodal projector: a file under `models_path`, or an absolute path."""
    lora: tuple[str, ...] = ()
    """LoRA adapters, all applied: files under `models_path`, or absolute paths."""
    chat_template_file: str | None = None
    """Path of a Jinja chat template that replaces the model's own."""
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    """Where a reasoning model's thoughts go in the answer."""


_ALWAYS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/infill",
    }
)
"""Paths that it has for every model."""


class LlamaCpp:
    """The adapter of `llama-server`."""

    name = "llamacpp"
    title = "llama.cpp"
    kind = BackendKind.BUILTIN
    options: type[BackendOptions] = LlamaCppOptions
    default_command: tuple[str, ...] = ("llama-server",)
    preference = 1
    reads: tuple[str, ...] = (".gguf",)
    reads_hub_ids = False
    cancels_only_streams = True
    more_ports = 0
    version_argv: tuple[str, ...] = ("--version",)
    devices_argv: tuple[str, ...] = ("--list-devices",)

    def bound(self, engine: Engine) -> LlamaCpp:
        """The same for every engine."""
        return self

    def source_need(self, source: str) -> SourceNeed:
        """A file."""
        return SourceNeed.DISK

    def read_devices(self, text: str) -> frozenset[DeviceKind] | None:
        """Lines such as `CUDA0: NVIDIA GeForce RTX 3060 (12288 MiB, 11650 MiB free)` below `Available devices:`.

        Vulkan numbers cards in its own way and heeds no UUID, so such a build is trusted with a card only where there is but one.
        """
        _, found, listed = text.partition("Available devices:")
        if not found:
            return None
        patterns = _GPU_KINDS if listed.count("Vulkan") > 1 else (*_GPU_KINDS, *_VULKAN_KINDS)
        return frozenset(kind for pattern, kind in patterns if pattern.search(listed))

    def suit(self, options: BackendOptions | None, found: Found) -> BackendOptions:
        """A projector beside the model, an adapter over its base, and the switch without which it embeds or ranks nothing."""
        chosen = options if isinstance(options, LlamaCppOptions) else LlamaCppOptions()
        capabilities = found.loaded.shape.capabilities if found.loaded.shape else ()
        return replace(
            chosen,
            embeddings=chosen.embeddings or "embedding" in capabilities,
            reranking=chosen.reranking or "rerank" in capabilities,
            mmproj=chosen.mmproj or (found.projector.path if found.projector else None),
            lora=(*chosen.lora, found.path) if found.is_adapter else chosen.lora,
        )

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """The multimodal projector and LoRA adapters."""
        options = _options(spec)
        return (*((options.mmproj,) if options.mmproj else ()), *options.lora)

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate:
        """From the file's header, part by part; from its size where the header cannot be read; `vram` in the config wins."""
        prompts = _options(spec).cache_ram
        if spec.vram != "auto":
            return VramEstimate(total=spec.vram, basis=f"vram: {format_bytes(spec.vram)} in the config", host=prompts)
        if facts.shape is None:
            return _by_size(facts.size or Bytes(0), prompts)
        memory = _memory(spec, facts.shape, facts.companions)
        return _by_shape(memory, Bytes(prompts + memory.checkpoint * _CHECKPOINTS * spec.parallel))

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """`llama-server` on one loopback port with everything pinned that it would otherwise guess."""
        argv = [
            *engine.command,
            *("--model", facts.path),
            *("--alias", spec.name),
            *("--host", endpoint.host),
            *("--port", str(endpoint.port)),
            *("--ctx-size", str(_cells(spec.context) * spec.parallel)),
            *("--parallel", str(spec.parallel)),
            # It would shrink context and layers by what is free at that moment; we have reserved what it needs.
            *("--fit", "off"),
            # Each open connection holds a thread; with the default, a burst starves /health.
            *("--threads-http", str(spec.parallel + 12)),
            "--metrics",
            # Of sliding and recurrent layers' states, in RAM; the default of 32 for each slot would be in nobody's budget.
            *("--ctx-checkpoints", str(_CHECKPOINTS)),
            *_device_flags(placement),
            *_option_flags(_options(spec), facts.companions),
            *engine.args,
            *spec.args,
        ]
        # On an abort ggml would fork a debugger on itself and wait for it.
        env = {"GGML_NO_BACKTRACE": "1", **visible(placement), **engine.env, **spec.env}
        if endpoint.key:
            env["LLAMA_API_KEY"] = endpoint.key  # not an argument: those are for all users to read
        return Launch(argv=fill(argv, spec, facts, endpoint), env=env)

    def probes(self, spec: ModelSpec) -> Probes:
        """`/health` tells loading from loaded, `/v1/models` that it is our model, `/slots` that its main loop turns."""
        return Probes(
            readiness=(Probe(path="/health"), Probe(path="/v1/models"), Probe(path="/slots")),
            liveness=Probe(path="/slots", timeout=Seconds(10)),
            canary=_canary(_options(spec)),
        )

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """503 is loading on every path; a server with another model under its name is not ours."""
        if reply.status is None:
            return Health.SILENT
        if reply.status == 503:
            return Health.LOADING
        if path == "/v1/models":
            return Health.READY if reply.status == 200 and spec.name in listed(reply.body) else Health.SILENT
        if path == "/slots" and reply.status in (404, 501):
            return Health.READY  # switched off by the operator's args: then nothing better is known
        return Health.READY if reply.status == 200 else Health.SILENT

    def load_probe(self, spec: ModelSpec) -> Probe | None:
        """Its metrics have to be switched on; its slots do not."""
        return Probe(path="/slots")

    def read_load(self, spec: ModelSpec, reply: ProbeReply) -> EngineLoad | None:
        """Slots that work. What it queues beyond them is told nowhere else than in its metrics."""
        try:
            slots = read_json(reply.body) if reply.status == 200 else None
            return EngineLoad(running=sum(bool(slot["is_processing"]) for slot in slots)) if slots is not None else None
        except (ValueError, KeyError, TypeError):
            return None

    def api(self, spec: ModelSpec) -> EngineApi:
        """It looks at no name, answers with its alias, which is ours, and has embeddings, reranking and audio only when told to."""
        options = _options(spec)
        switched = {
            "/v1/embeddings": (options.embeddings, "llamacpp.embeddings: true"),
            "/v1/rerank": (options.reranking, "llamacpp.reranking: true"),
            "/v1/audio/transcriptions": (bool(options.mmproj), "llamacpp.mmproj: a projector that hears"),
        }
        # Its own arguments may switch on what the options do not; then it is asked, and refuses by itself.
        by_hand = bool(spec.args)
        found = {path for path, (on, _) in switched.items() if on or by_hand}
        hints = {path: how for path, (_, how) in switched.items()}
        return EngineApi(paths=_ALWAYS | found, hints=hints, images=bool(options.mmproj), spare=True)

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Every failed start is exit 1: only the text tells them apart."""
        return explain_exit(status, log_tail, was_ready=was_ready)


_USUAL = LlamaCppOptions()


def _options(spec: ModelSpec) -> LlamaCppOptions:
    chosen = spec.options.get("llamacpp")
    return chosen if isinstance(chosen, LlamaCppOptions) else _USUAL


def _cells(context: int) -> int:
    return -(-context // _CELLS) * _CELLS


def _memory(spec: ModelSpec, shape: ModelShape, companions: Mapping[str, ModelFacts]) -> LlamaMemory:
    options = _options(spec)
    shapes = {name: facts.shape for name, facts in companions.items() if facts.shape}
    ubatch = options.ubatch or _UBATCH
    return llama_memory(
        shape,
        context=_cells(spec.context) * spec.parallel,
        parallel=spec.parallel,
        kv_unified=options.kv_unified,
        cache_type_k=options.cache_type_k,
        cache_type_v=options.cache_type_v,
        batch=ubatch if options.embeddings or options.reranking else options.batch or _BATCH,
        ubatch=ubatch,
        flash_attention=options.flash_attention != "off",
        embeddings=options.embeddings or options.reranking,
        projector=shapes.get(options.mmproj or ""),
        adapters=[shapes[name] for name in options.lora if name in shapes],
    )


def _by_shape(memory: LlamaMemory, ram: Bytes) -> VramEstimate:
    """The parts of a server that keeps `ram` bytes of prompts and checkpoints in host RAM."""
    layers = memory.per_layer
    fixed = Bytes(memory.fixed_device + memory.projector + memory.adapters + _slack(memory))
    basis = f"weights {format_bytes(memory.weights)} + cache {format_bytes(memory.cache)} + work {format_bytes(memory.compute)}"
    return VramEstimate(
        total=Bytes(sum(layers) + fixed),
        basis=basis,
        layers=layers,
        fixed=fixed,
        host=Bytes(memory.host + ram),
        on_host=Bytes(memory.total + _slack(memory) + ram),
    )


def _slack(memory: LlamaMemory) -> int:
    """The rules miss work buffers by up to a quarter either way (docs/memory.md); the program itself takes some, too."""
    return max(_PROGRAM, memory.compute // 4)


def _by_size(size: Bytes, prompts: Bytes) -> VramEstimate:
    margin = _MARGIN + int(size * _MARGIN_SHARE)
    basis = f"file {format_bytes(size)} + margin {format_bytes(margin)}, since its header could not be read"
    return VramEstimate(total=Bytes(size + margin), basis=basis, host=prompts, on_host=Bytes(size + margin + prompts))


def _device_flags(placement: Placement) -> tuple[str, ...]:
    """Where the layers go, exactly as they were placed."""
    if not placement.gpus:
        return ("--device", "none", "--n-gpu-layers", "0")
    if len(placement.gpus) == 1:
        layers = str(placement.split[0]) if placement.split else "all"
        return ("--n-gpu-layers", layers, "--split-mode", "none")
    shares = ",".join(str(count) for count in placement.split)
    return ("--n-gpu-layers", "all", "--split-mode", "layer", "--tensor-split", shares)


def _option_flags(options: LlamaCppOptions, companions: Mapping[str, ModelFacts]) -> Iterator[str]:
    valued: tuple[tuple[str, object], ...] = (
        ("--flash-attn", options.flash_attention),
        ("--cache-type-k", options.cache_type_k),
        ("--cache-type-v", options.cache_type_v),
        ("--cache-ram", options.cache_ram // _MIB),
        ("--batch-size", options.batch),
        ("--ubatch-size", options.ubatch),
        ("--threads", options.threads),
        ("--pooling", options.pooling),
        ("--mmproj", options.mmproj and _found(options.mmproj, companions)),
        ("--chat-template-file", options.chat_template_file),
        ("--reasoning-format", options.reasoning_format),
    )
    for flag, value in valued:
        if value is not None:
            yield from (flag, str(value))
    switches = (("--kv-unified", options.kv_unified), ("--embeddings", options.embeddings), ("--reranking", options.reranking))
    for flag, on in switches:
        if on:
            yield flag
    for name in options.lora:
        yield from ("--lora", _found(name, companions))


def _canary(options: LlamaCppOptions) -> Probe:
    """One token, or one vector where tokens are not made. It keeps out of the cached prompts."""
    if options.reranking:
        return Probe(path="/v1/rerank", body=b'{"query": "a", "documents": ["a"]}')
    if options.embeddings:
        return Probe(path="/v1/embeddings", body=b'{"input": "a"}')
    return Probe(path="/completion", body=b'{"prompt": "a", "n_predict": 1, "cache_prompt": false}')


def _found(name: str, companions: Mapping[str, ModelFacts]) -> str:
    """Where the file is; as the config names it when it has not been looked for."""
    return companions[name].path if name in companions else name


BACKEND = LlamaCpp()
