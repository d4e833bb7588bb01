"""Hugging Face's TGI, `text-generation-launcher`: a launcher, a shard per GPU and a router. Facts from its last source, 3.3."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from offloadd.backends.base import ExitPattern, HubEngine, default_exit, match_exit, own_folder, read_json, visible
from offloadd.backends.gauges import gauge
from offloadd.backends.hub_memory import GIB, HubMemory, hub_memory
from offloadd.backends.words import fill
from offloadd.state.desired import BackendOptions, Engine, ModelSpec
from offloadd.state.launch import (
    Endpoint,
    EngineApi,
    EngineLoad,
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

_PROGRAM = Bytes(2 * GIB)
"""RAM of the launcher, its shards and the router: an assumption, not measured."""
_BATCH = 4096
_WIGGLE = 0.90
"""It fills a card to so much of its fraction, whatever that is."""
_AFTER = Bytes(GIB // 2)
"""Taken after the cache was sized: graphs."""
_FRACTION_STEP = 10_000
_BODIES = 2**30
"""Bytes of a request that it is told to take: by itself no more than 2 MB, which a picture exceeds. server.max_body bounds them."""
_SLOW = Seconds(10)
"""/health makes a token after a failure, and may wait behind other work."""
_ONE_TOKEN = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiOptions(BackendOptions):
    """Options of `text-generation-launcher` that have a type of their own; anything else goes into `args`."""

    quantize: str | None = None
    """How weights are quantized: awq, gptq, eetq, exl2, fp8, marlin, bitsandbytes-nf4, …"""
    dtype: Literal["float16", "bfloat16"] | None = None
    """Type that weights are computed in."""
    kv_cache_dtype: Literal["fp8_e4m3fn", "fp8_e5m2"] | None = None
    """Type of the KV cache; default: as the weights."""
    prefill: int | None = None
    """Prompt tokens computed at once (`--max-batch-prefill-tokens`); drives the memory for activations."""
    cuda_graphs: bool = True
    """Without, less memory and slower tokens."""
    lora: tuple[str, ...] = ()
    """LoRA adapters, which requests name as `adapter_id`."""
    tokenizer_config: str | None = None
    """Path of a tokenizer config, with another chat template for instance."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Runs code that comes with the model: only where you have read it, with `revision` set to what you have read."""


_FAILURES = (
    ExitPattern(
        re.compile(r"error: unexpected argument '(?P<flag>[^']+)'"),
        ExitKind.BAD_OPTION,
        "text-generation-launcher does not know {flag}",
        "remove it from args (text-generation-launcher --help lists what there is)",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"error: invalid value '(?P<value>[^']*)' for '(?P<flag>[^']+)'"),
        ExitKind.BAD_OPTION,
        "text-generation-launcher refuses {value} for {flag}",
        "correct the value in the config",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"ArgumentValidation\(\"(?P<why>.*)\"\)"),
        ExitKind.BAD_OPTION,
        "text-generation-launcher refuses its options: {why}",
        "correct the config",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"Failed to bind to addr|failed to build prometheus recorder|failed to listen on"),
        ExitKind.PORT_TAKEN,
        "one of its ports was taken by another process",
        "nothing to do: the next start takes others",
    ),
    ExitPattern(
        re.compile(r"Not enough memory to handle (?P<what>.*?)\. You need|Not enough memory to handle (?P<other>.*)"),
        ExitKind.OUT_OF_MEMORY,
        "not enough memory for {what}{other}",
        "lower context or tgi.prefill, or raise vram",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"OutOfMemoryError|CUDA out of memory"),
        ExitKind.OUT_OF_MEMORY,
        "the GPU had not enough memory",
        "lower context, parallel or tgi.prefill, or raise vram",
    ),
    ExitPattern(
        re.compile(r"NotEnoughCUDADevices\(\"(?P<why>.*)\"\)"),
        ExitKind.BAD_OPTION,
        "it sees too few GPUs: {why}",
        "check devices, and what text-generation-launcher --env says",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"Error: DownloadError"),
        ExitKind.BAD_MODEL,
        "it could not download the model",
        "check source and the network; HF_TOKEN in env for what is not public",
    ),
    ExitPattern(
        re.compile(r"Shard (?P<rank>\d+) failed to start|Error: ShardCannotStart"),
        ExitKind.BAD_MODEL,
        "a shard could not load the model",
        "the cause is earlier in its log, below `Shard complete standard error output`",
    ),
)
_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize"})


class Tgi(HubEngine):
    """The adapter of `text-generation-launcher`."""

    name = "tgi"
    title = "TGI"
    options: type[BackendOptions] = TgiOptions
    default_command: tuple[str, ...] = ("text-generation-launcher",)
    preference = 3
    more_ports = 2
    version_argv: tuple[str, ...] = ("--version",)

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
        """What it needs at least; it then takes all of its promise. None for a hub id that has not been downloaded."""
        if spec.vram != "auto":
            even = {count: Bytes(-(-spec.vram // count)) for count in (2, 4, 8)}
            basis = f"vram: {format_bytes(spec.vram)} in the config"
            return VramEstimate(total=spec.vram, basis=basis, host=_PROGRAM, on_host=spec.vram, even=even, elastic=True)
        if facts.shape is None:
            return None
        memory = _memory(spec, facts)
        on_host = Bytes(_PROGRAM + memory.weights + memory.cache + memory.work)
        return VramEstimate(
            total=_with_wiggle(memory.total),
            basis=memory.basis,
            host=_PROGRAM,
            on_host=on_host,
            even={count: _with_wiggle(size) for count, size in memory.even.items()},
            elastic=True,
        )

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """The launcher, with every option said that it would else take from a variable with a plain name."""
        options, context = _options(spec), _context(spec, facts)
        metrics_port, meeting_port = endpoint.more
        argv = [
            *engine.command,
            *("--model-id", facts.path),
            *("--hostname", endpoint.host),
            *("--port", str(endpoint.port)),
            *("--prometheus-port", str(metrics_port)),
            # An instance that finds another's sockets here deletes them.
            *("--shard-uds-path", _meeting_place(engine, endpoint)),
            *("--master-addr", "127.0.0.1"),
            *("--master-port", str(meeting_port)),
            *("--num-shard", str(max(1, len(placement.gpus)))),
            *("--max-total-tokens", str(context)),
            *("--max-input-tokens", str(context - 1)),
            *("--max-batch-prefill-tokens", str(max(options.prefill or _BATCH, context - 1))),
            *("--max-batch-size", str(spec.parallel)),
            *("--max-concurrent-requests", str(spec.parallel + 16)),
            # Router and shards are given this long, one after the other.
            *("--graceful-termination-timeout", str(max(1, int(spec.stop_timeout / 3)))),
            *("--usage-stats", "off"),
            # Said twice, it refuses to start.
            *(() if _says("--payload-limit", engine.args, spec.args) else ("--payload-limit", str(_BODIES))),
            *_memory_flags(placement),
            *_option_flags(options),
            *engine.args,
            *spec.args,
        ]
        env = {"DO_NOT_TRACK": "1", **visible(placement), **engine.env, **spec.env}
        if endpoint.key:
            env["API_KEY"] = endpoint.key  # not an argument: those are for all users to read
        return Launch(argv=fill(argv, spec, facts, endpoint), env=env)

    def probes(self, spec: ModelSpec) -> Probes:
        """The port opens when all is loaded; `/info` says what was."""
        token = Probe(path="/generate", body=_ONE_TOKEN, timeout=Seconds(60))
        readiness = (Probe(path="/health", timeout=_SLOW), Probe(path="/info"), token)
        return Probes(readiness=readiness, liveness=token, canary=token)

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """Until it is ready it refuses connections. `Model is overloaded` comes from one that works."""
        if reply.status is None:
            return Health.SILENT
        if path == "/generate" and reply.status == 429:
            return Health.READY
        if path == "/info":
            return Health.READY if reply.status == 200 and _is_tgi(reply.body) else Health.SILENT
        return Health.READY if reply.status == 200 else Health.SILENT

    def load_probe(self, spec: ModelSpec) -> Probe | None:
        """Its metrics, on the port that it serves on."""
        return Probe(path="/metrics")

    def read_load(self, spec: ModelSpec, reply: ProbeReply) -> EngineLoad | None:
        """A gauge is there from its first use on: one that is missing is 0, of something that is TGI."""
        if reply.status != 200 or b"tgi_" not in reply.body:
            return None
        running, waiting = gauge(reply.body, "tgi_batch_current_size"), gauge(reply.body, "tgi_queue_size")
        taken, most = gauge(reply.body, "tgi_batch_current_max_tokens"), gauge(reply.body, "tgi_batch_max_total_tokens")
        cache = min(1.0, sum(taken) / sum(most)) if taken and sum(most) > 0 else None
        return EngineLoad(running=int(sum(running)), waiting=int(sum(waiting)), cache=cache)

    def api(self, spec: ModelSpec) -> EngineApi:
        """It looks at no name and answers with its own; its finish reasons and ids are not OpenAI's."""
        return EngineApi(paths=_PATHS, exact=False)

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Its last line names the part that failed, and the cause stands before it."""
        if not was_ready and status.signal is None:
            cause = match_exit(_FAILURES, log_tail)
            if cause is not None:
                return cause
        if any("crashed" in line.lower() for line in log_tail[-40:]) and status.code == 1:
            part = "its router" if any("Webserver Crashed" in line for line in log_tail[-40:]) else "a shard"
            return ExitCause(kind=ExitKind.CRASHED, message=f"{part} died, and with it the whole", hint="its log has more")
        return default_exit(status, log_tail, was_ready=was_ready)


_USUAL = TgiOptions()


def _options(spec: ModelSpec) -> TgiOptions:
    chosen = spec.options.get("tgi")
    return chosen if isinstance(chosen, TgiOptions) else _USUAL


def _context(spec: ModelSpec, facts: ModelFacts) -> int:
    most = facts.shape.context_train if facts.shape else 0
    return max(2, min(spec.context, most) if most else spec.context)


def _memory(spec: ModelSpec, facts: ModelFacts) -> HubMemory:
    assert facts.shape is not None  # noqa: S101  (callers have looked)
    options, context = _options(spec), _context(spec, facts)
    return hub_memory(
        facts.shape,
        context=context,
        parallel=spec.parallel,
        batch=max(options.prefill or _BATCH, context - 1),
        cache_bytes=1 if options.kv_cache_dtype else 2,
        graphs=options.cuda_graphs,
    )


def _with_wiggle(size: Bytes) -> Bytes:
    """It leaves a tenth of what it may take, so it must be promised that much more."""
    return Bytes(int(size / _WIGGLE))


def _memory_flags(placement: Placement) -> Iterator[str]:
    """Its cache grows until the whole card, others' part included, is nine tenths of the fraction full."""
    fractions = []
    for gpu in placement.gpus:
        whole = placement.whole.get(gpu)
        if whole:
            filled = placement.used.get(gpu, Bytes(0)) + placement.reserved[gpu] - _AFTER
            fractions.append(max(1, int(filled / _WIGGLE * _FRACTION_STEP) // whole))
    if fractions:
        yield from ("--cuda-memory-fraction", f"{min(_FRACTION_STEP, *fractions) / _FRACTION_STEP:.4f}")


def _option_flags(options: TgiOptions) -> Iterator[str]:
    valued = (
        ("--quantize", options.quantize),
        ("--dtype", options.dtype),
        ("--kv-cache-dtype", options.kv_cache_dtype),
        ("--cuda-graphs", None if options.cuda_graphs else "0"),
        ("--lora-adapters", ",".join(options.lora) or None),
        ("--tokenizer-config-path", options.tokenizer_config),
        ("--revision", options.revision),
    )
    for flag, value in valued:
        if value is not None:
            yield from (flag, value)
    if options.trust_remote_code:
        yield "--trust-remote-code"


def _says(flag: str, *words: Sequence[str]) -> bool:
    """Whether it is among these arguments, with its value in a word of its own or not."""
    return any(word == flag or word.startswith(f"{flag}=") for each in words for word in each)


def _is_tgi(body: bytes) -> bool:
    try:
        return bool(read_json(body)["router"])
    except (ValueError, KeyError, TypeError):
        return False


def _meeting_place(engine: Engine, endpoint: Endpoint) -> str:
    """Of its parts, whose sockets stay when it is killed: in a folder that goes with it.

    Elsewhere, whoever could guess it could be there first, so it is made of the launch's own key, which it does not tell.
    """
    folder = own_folder(engine, endpoint)
    if folder:
        return f"{folder}/shard"
    name = hashlib.sha256(f"{endpoint.port} {endpoint.key}".encode()).hexdigest()[:16]
    return f"/tmp/offloadd-tgi-{name}"  # noqa: S108  # nosec B108  (nobody guesses it)


BACKEND = Tgi()
