"""llama.cpp's `llama-server`: one process, one model, GGUF files. Facts from builds b10434 and b11434."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from offloadd.backends.base import ExitPattern, default_exit, match_exit
from offloadd.state.desired import BackendOptions, Engine, ModelSpec
from offloadd.state.launch import (
    Endpoint,
    ExitCause,
    ExitKind,
    ExitStatus,
    Health,
    Launch,
    ModelFacts,
    Placement,
    Probe,
    ProbeReply,
    Probes,
    VramEstimate,
)
from offloadd.units import Bytes, Seconds, format_bytes

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]

_MIB = 2**20
_CELLS = 256
"""llama-server rounds the context of a slot up to a multiple of this."""
_MARGIN = Bytes(512 * _MIB)
"""Working memory beside the weights, until estimates know the model's shape."""
_MARGIN_SHARE = 0.15


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
    """Path of the multimodal projector."""
    lora: tuple[str, ...] = ()
    """Paths of LoRA adapters, all applied."""
    chat_template_file: str | None = None
    """Path of a Jinja chat template that replaces the model's own."""
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    """Where a reasoning model's thoughts go in the answer."""


_FAILURES = (
    ExitPattern(
        re.compile(r"error: invalid argument: (?P<flag>\S+)"),
        ExitKind.BAD_OPTION,
        "llama-server does not know the option {flag}",
        "remove it from args, or use a llama-server that has it (llama-server --help lists them)",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r'error while handling argument "(?P<flag>[^"]+)": (?P<why>.*)'),
        ExitKind.BAD_OPTION,
        "llama-server refuses the value given for {flag}: {why}",
        "correct the value in the config",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"couldn't bind HTTP server socket.*port: (?P<port>\d+)"),
        ExitKind.PORT_TAKEN,
        "port {port} was taken by another process",
        "nothing to do: the next start takes another port",
    ),
    ExitPattern(
        re.compile(r"failed to open GGUF file '(?P<path>[^']*)'(?: \((?P<why>[^)]*)\))?"),
        ExitKind.BAD_MODEL,
        "cannot open the model file {path}: {why}",
        "check that the file exists and that the daemon's user may read it",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"data is not within the file bounds"),
        ExitKind.BAD_MODEL,
        "the model file is truncated: its tensors reach past its end",
        "copy or download the file again, and compare its size with the original",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"(?P<what>invalid magic characters|failed to read magic|failed to read key-value pairs)"),
        ExitKind.BAD_MODEL,
        "the model file is not a whole GGUF file ({what})",
        "copy or download the file again",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"unknown model architecture: '(?P<arch>[^']*)'"),
        ExitKind.BAD_MODEL,
        "this llama-server does not know the architecture {arch}",
        "use a newer llama-server",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"this GGUF file is version (?P<version>\d+)"),
        ExitKind.BAD_MODEL,
        "this llama-server cannot read GGUF version {version}",
        "use a newer llama-server",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"failed to load multimodal model, '(?P<path>[^']*)'"),
        ExitKind.BAD_MODEL,
        "cannot load the multimodal projector {path}",
        "check llamacpp.mmproj",
        permanent=True,
    ),
    ExitPattern(
        re.compile(
            r"cudaMalloc failed: out of memory|unable to allocate \S+ buffer|failed to allocate buffer"
            r"|failed to allocate compute|ErrorOutOfDeviceMemory|failed to create_context"
        ),
        ExitKind.OUT_OF_MEMORY,
        "there was not enough memory to load the model",
        "lower context, parallel or gpu_layers, or free memory",
    ),
)
_WRONG_PROCESSOR = ExitCause(
    kind=ExitKind.NOT_STARTED,
    message="this llama-server was built for instructions that this processor lacks (SIGILL)",
    hint="use a llama-server built for this machine, or a portable one",
    permanent=True,
)


class LlamaCpp:
    """The adapter of `llama-server`."""

    name = "llamacpp"
    title = "llama.cpp"
    options: type[BackendOptions] = LlamaCppOptions
    default_command = ("llama-server",)
    preference = 1
    reads = (".gguf",)
    reads_hub_ids = False
    cancels_only_streams = True
    version_argv = ("--version",)

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate:
        """File size plus a margin, plus the prompt cache that we allow; `vram` in the config wins."""
        if spec.vram != "auto":
            return VramEstimate(total=spec.vram, basis=f"vram: {format_bytes(spec.vram)} in the config")
        size = facts.size or Bytes(0)
        cache = _options(spec).cache_ram
        margin = _MARGIN + int(size * _MARGIN_SHARE)
        basis = f"file {format_bytes(size)} + margin {format_bytes(margin)} + prompt cache {format_bytes(cache)}"
        return VramEstimate(total=Bytes(size + margin + cache), basis=basis)

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
            *_device_flags(spec),
            *_option_flags(_options(spec)),
            *engine.args,
            *spec.args,
        ]
        # On an abort ggml would fork a debugger on itself and wait for it.
        env = {"GGML_NO_BACKTRACE": "1", **engine.env, **spec.env}
        return Launch(argv=tuple(argv), env=env)

    def probes(self, spec: ModelSpec) -> Probes:
        """`/health` tells loading from loaded, `/v1/models` that it is our model, `/slots` that its main loop turns."""
        return Probes(
            readiness=(Probe(path="/health"), Probe(path="/v1/models"), Probe(path="/slots")),
            liveness=Probe(path="/slots", timeout=Seconds(10)),
        )

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """503 is loading on every path; a server with another model under its name is not ours."""
        if reply.status is None:
            return Health.SILENT
        if reply.status == 503:
            return Health.LOADING
        if path == "/v1/models":
            return Health.READY if reply.status == 200 and spec.name in _listed(reply.body) else Health.SILENT
        if path == "/slots" and reply.status in (404, 501):
            return Health.READY  # switched off by the operator's args: then nothing better is known
        return Health.READY if reply.status == 200 else Health.SILENT

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Every failed start is exit 1: only the text tells them apart."""
        if status.signal == signal.SIGILL and not was_ready:
            return _WRONG_PROCESSOR
        if status.signal is None and not was_ready:
            cause = match_exit(_FAILURES, log_tail)
            if cause is not None:
                return cause
        return default_exit(status, log_tail, was_ready=was_ready)


def _options(spec: ModelSpec) -> LlamaCppOptions:
    chosen = spec.options.get("llamacpp")
    return chosen if isinstance(chosen, LlamaCppOptions) else LlamaCppOptions()


def _cells(context: int) -> int:
    return -(-context // _CELLS) * _CELLS


def _device_flags(spec: ModelSpec) -> tuple[str, ...]:
    """Only host RAM is in the ledger so far: a GPU is used when the operator says how many layers."""
    if spec.devices == "cpu" or spec.gpu_layers in ("auto", 0):
        return ("--device", "none", "--n-gpu-layers", "0")
    return ("--n-gpu-layers", str(spec.gpu_layers))


def _option_flags(options: LlamaCppOptions) -> Iterator[str]:
    valued: tuple[tuple[str, object], ...] = (
        ("--flash-attn", options.flash_attention),
        ("--cache-type-k", options.cache_type_k),
        ("--cache-type-v", options.cache_type_v),
        ("--cache-ram", options.cache_ram // _MIB),
        ("--batch-size", options.batch),
        ("--ubatch-size", options.ubatch),
        ("--threads", options.threads),
        ("--pooling", options.pooling),
        ("--mmproj", options.mmproj),
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
    for path in options.lora:
        yield from ("--lora", path)


def _listed(body: bytes) -> set[str]:
    try:
        return {str(entry["id"]) for entry in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


BACKEND = LlamaCpp()
