"""vLLM's `vllm serve`: models from a hub or a folder, several processes, one process group. Facts from 0.32."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offloadd.backends.base import ExitPattern, HubEngine, default_exit, listed, match_exit, own_folder, visible
from offloadd.backends.gauges import gauge
from offloadd.backends.hub_memory import DEVICE_CONTEXT, GIB, HubMemory, hub_memory
from offloadd.backends.words import fill
from offloadd.state.desired import BackendOptions, Engine, ModelSpec
from offloadd.state.found import Found
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
    Naps,
    Placement,
    Probe,
    ProbeReply,
    Probes,
    VramEstimate,
)
from offloadd.units import Bytes, Seconds, format_bytes

_PROGRAM = Bytes(2 * GIB)
"""RAM of its processes on a machine with GPUs: interpreters and libraries, three times over."""
_CPU_PROGRAM = Bytes(3 * GIB)
"""The same where it computes on the CPU: measured at 3.2 GB resident, shared pages counted twice."""
_BATCH = 2048
_SHARE_STEP = 10_000
_GRAPHS_ASLEEP = Bytes(GIB)
_ASLEEP = Bytes(GIB)
"""What a sleeping server still holds of each card, its context above all: an assumption, not measured. Graphs stay as well."""
_FALL_ASLEEP = Seconds(60)
_WAKE_UP = Seconds(600)
"""Weights may have to be read from disk; how long it may really take is the planner's to judge (start_timeout)."""
_DEVELOPMENT = frozenset(
    {
        "sleep",
        "wake_up",
        "is_sleeping",
        "pause",
        "resume",
        "is_paused",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "release_kv_cache_memory",
        "server_info",
        "collective_rpc",
        "abort_requests",
        "update_weights",
        "init_weight_transfer_engine",
        "get_world_size",
    }
)
"""Paths that its development mode opens, without a key."""
_ASKED = Seconds(3)
_WARM_UP = Seconds(60)
"""The first request of a kind was seen to take 14.5 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions(BackendOptions):
    """Options of `vllm serve` that have a type of their own; anything else goes into `args`."""

    eager: bool = False
    """`--enforce-eager`: no CUDA graphs, so less memory and a quicker start, and slower tokens."""
    kv_cache: Bytes | None = None
    """Exactly so much for the KV cache of each GPU (`--kv-cache-memory-bytes`); default: what its promise leaves."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2", "bfloat16"] = "auto"
    """Type of the KV cache."""
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    """Type that weights are computed in."""
    quantization: str | None = None
    """How weights are quantized, where the model's own config does not say it."""
    batch: int | None = None
    """Tokens computed at once (`--max-num-batched-tokens`); drives the memory for activations."""
    cpu_offload: Bytes = Bytes(0)
    """Part of the weights of each GPU that is kept in host RAM."""
    runner: Literal["auto", "generate", "pooling"] = "auto"
    """`pooling` serves embeddings, reranking and scores instead of text."""
    convert: Literal["auto", "none", "embed", "classify"] = "auto"
    """How a model that makes text is turned into a pooling one."""
    tool_call_parser: str | None = None
    """Switches tool calls on, and says how this model writes them."""
    reasoning_parser: str | None = None
    """How this model writes its thoughts."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the model's own."""
    lora: tuple[str, ...] = ()
    """LoRA adapters, each as `NAME=PATH`. The one with the model's own name is what its clients get; the others are asked for by
    name through /upstream."""
    lora_rank: int | None = None
    """The highest rank of an adapter (`--max-lora-rank`); vLLM itself takes no more than 16."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Runs code that comes with the model: only where you have read it, with `revision` set to what you have read."""
    sleep: Literal[0, 1, 2] = 0
    """Puts an idle instance on GPUs to sleep where it would be stopped otherwise, and wakes it when a request wants it. 1 keeps
    the weights in RAM, which is reserved for them from the start; 2 drops them, and reads them again to wake. It is stopped only
    when what it holds asleep is needed too. It opens vLLM's development endpoints on its loopback port, where they need no key."""
    asleep: Bytes | None = None
    """What it still holds of each GPU asleep; default: 2 GiB, 1 GiB with `eager`. More counts where it is seen to hold more."""
    load_format: str | None = None
    """How weights are read, such as `safetensors` or `dummy`."""


_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Those that every vLLM of late takes for --max-lora-rank."""
_LEAST_RANK = 16
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"}
"""It reports to nobody; and it listens on ports of its own for its processes, none of which may be reached from elsewhere."""

_FAILURES = (
    ExitPattern(
        re.compile(r"error: unrecognized arguments: (?P<flag>.+)"),
        ExitKind.BAD_OPTION,
        "vllm does not know {flag}",
        "remove it from args, or use a vLLM that has it (vllm serve --help=all lists them)",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"error: argument (?P<flag>\S+): (?P<why>.+)"),
        ExitKind.BAD_OPTION,
        "vllm refuses the value given for {flag}: {why}",
        "correct the value in the config",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"\[Errno 98\]|[Aa]ddress already in use"),
        ExitKind.PORT_TAKEN,
        "its port was taken by another process",
        "nothing to do: the next start takes another port",
    ),
    ExitPattern(
        # Not the report after a good start, which begins with the same words.
        re.compile(r"Free memory on device (?P<device>\S+) \((?P<free>[^/]+)/[^)]+\) on startup is less than"),
        ExitKind.OUT_OF_MEMORY,
        "only {free} were free on {device} when it started",
        "something else took memory in that moment; if it stays so, see foreign processes in /vram/status",
    ),
    ExitPattern(
        re.compile(r"estimated maximum model length is (?P<most>\d+)"),
        ExitKind.OUT_OF_MEMORY,
        "its KV cache holds {most} tokens only, less than one sequence",
        "set context to {most} or less, or vram to more",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"No available memory for the cache blocks|is larger than the available KV cache memory"),
        ExitKind.OUT_OF_MEMORY,
        "its weights leave no memory for the KV cache",
        "raise vram, lower context, or set vllm.eager: true",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"on kv cache allocation is less than requested memory for kv"),
        ExitKind.OUT_OF_HOST_MEMORY,
        "there was not enough RAM for its KV cache",
        "lower context or parallel, or free memory",
    ),
    ExitPattern(
        re.compile(r"Error in memory profiling"),
        ExitKind.OUT_OF_MEMORY,
        "another process freed memory of the GPU while it was measured",
        "nothing to do: it is tried again",
    ),
    ExitPattern(
        re.compile(r"torch\.(?:cuda\.)?OutOfMemoryError|CUDA out of memory"),
        ExitKind.OUT_OF_MEMORY,
        "the GPU had not enough memory",
        "lower context, parallel or vllm.batch, or raise vram",
    ),
    ExitPattern(
        re.compile(r"max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len.*?(?:=|is )(?P<most>\d+)"),
        ExitKind.BAD_OPTION,
        "context {asked} is more than the model's own {most}",
        "lower context",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len"),
        ExitKind.BAD_OPTION,
        "context {asked} is more than the model was made for",
        "lower context",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"Model architectures \[(?P<names>[^\]]*)\] are not supported"),
        ExitKind.BAD_MODEL,
        "this vLLM does not know the architecture {names}",
        "use a newer vLLM, or another engine",
        permanent=True,
    ),
    ExitPattern(
        re.compile(
            r"HFValidationError: (?P<why>.*)|(?P<other>OSError: .* is not a local folder and is not a valid model identifier.*)"
        ),
        ExitKind.BAD_MODEL,
        "cannot find the model: {why}{other}",
        "check source; a hub id needs the network, or a model that was downloaded before",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"OSError: It looks like the config file at '(?P<path>[^']*)' is not a valid JSON file"),
        ExitKind.BAD_MODEL,
        "{path} is not a model that vLLM can read",
        "give it a folder or a hub id in Hugging Face's layout: sources: {{vllm: …}}",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"SafetensorError: (?P<why>.*)|(?P<other>params\.json)"),
        ExitKind.BAD_MODEL,
        "the model's files are incomplete: {why}{other}",
        "copy or download them again",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"Value error, (?P<why>.*?)(?: \[type=.*)?$"),
        ExitKind.BAD_OPTION,
        "vllm refuses its options: {why}",
        "correct the config",
        permanent=True,
    ),
    ExitPattern(
        re.compile(r"Engine core initialization failed"),
        ExitKind.CRASHED,
        "its engine failed to start",
        "the cause is earlier in its log, on lines of EngineCore or Worker",
    ),
)
_ENGINE_DIED = re.compile(
    r"EngineDeadError|EngineCore encountered an issue|Engine core proc .* died|Shutting down due to engine death"
)
_TEXT = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
_POOLING = frozenset({"/v1/embeddings", "/v1/rerank", "/v1/score", "/pooling", "/classify", "/tokenize", "/detokenize"})
_HINTS = dict.fromkeys(("/v1/embeddings", "/v1/rerank", "/v1/score"), "vllm.runner: pooling")


class Vllm(HubEngine):
    """The adapter of `vllm serve`."""

    name = "vllm"
    title = "vLLM"
    options: type[BackendOptions] = VllmOptions
    default_command: tuple[str, ...] = ("vllm", "serve")
    preference = 2
    # No version_argv: its own --version imports all of it, for many seconds.

    def suit(self, options: BackendOptions | None, found: Found) -> BackendOptions:
        """An adapter over its base, and the switch without which a model that makes vectors cannot be asked for them."""
        chosen = options if isinstance(options, VllmOptions) else VllmOptions()
        capabilities = found.loaded.shape.capabilities if found.loaded.shape else ()
        if chosen.runner == "auto" and not {"embedding", "rerank"}.isdisjoint(capabilities):
            chosen = replace(chosen, runner="pooling")
        if not found.is_adapter:
            return chosen
        rank = found.facts.shape.rank if found.facts.shape else 0
        allowed = next((each for each in _RANKS if each >= rank), rank)
        return replace(
            chosen,
            lora=(*chosen.lora, f"{found.name}={found.path}"),
            lora_rank=max(allowed, chosen.lora_rank or _LEAST_RANK),
            # After a deep sleep the base is read again, and nobody says that the adapter is.
            sleep=1 if chosen.sleep else 0,
        )

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """Adapters by their paths; what vLLM is to look for by itself is its own affair."""
        return tuple(path for _, path in _adapters(_options(spec)) if path.startswith("/"))

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
        """What it needs at least; it then takes all of its promise. None for a hub id that has not been downloaded."""
        options = _options(spec)
        if facts.shape is None:
            return _by_hand(spec, options)
        memory = _memory(spec, facts, options)
        host = Bytes(_PROGRAM + options.cpu_offload + (memory.weights if options.sleep == 1 else 0))
        on_host = Bytes(_CPU_PROGRAM + memory.weights + _cpu_cache(memory.cache, options) * GIB)
        if spec.vram != "auto":
            return _fixed(spec.vram, host, options, counts=tuple(memory.even))
        return VramEstimate(
            total=memory.total,
            basis=memory.basis,
            host=host,
            on_host=on_host,
            even=memory.even,
            elastic=True,
            asleep=_asleep(options),
        )

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """`vllm serve` on one loopback port, with its part of each card as a share of the whole."""
        options = _options(spec)
        argv = [
            *engine.command,
            facts.path,
            *("--served-model-name", _served_name(spec, options)),
            *("--host", endpoint.host),
            *("--port", str(endpoint.port)),
            *("--max-model-len", str(_context(spec, facts))),
            *("--max-num-seqs", str(spec.parallel)),
            # One line for each probe would fill its log.
            *("--disable-access-log-for-endpoints", "/health,/metrics,/v1/models"),
            "--enable-prompt-tokens-details",
            *_memory_flags(placement, options),
            *_option_flags(options),
            *(("--enable-sleep-mode",) if options.sleep and placement.gpus else ()),
            *engine.args,
            *spec.args,
        ]
        # On the CPU not even an empty list of GPUs: it takes that for a cluster whose cards are about to come, and dies of it.
        seen = visible(placement) if placement.gpus else {}
        naps = {"VLLM_SERVER_DEV_MODE": "1"} if options.sleep and placement.gpus else {}
        folder = own_folder(engine, endpoint)
        # Its sockets stay when it is killed. They are here also where TMPDIR is another, whose path may be too long for them.
        sockets = {"VLLM_RPC_BASE_PATH": folder} if folder else {}
        env = {**_ENVIRONMENT, **naps, **seen, **sockets, **engine.env, **spec.env}
        if endpoint.key:
            env["VLLM_API_KEY"] = endpoint.key  # not an argument: those are for all users to read
        if not placement.gpus:
            memory = _memory(spec, facts, options).cache if facts.shape else Bytes(0)
            env = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": str(_cpu_cache(memory, options)), **env}
        return Launch(argv=fill(argv, spec, facts, endpoint), env=env)

    def probes(self, spec: ModelSpec) -> Probes:
        """Its log and its /health say nothing of whether it works: the model must be listed, and one token come back."""
        token = _canary(spec)
        return Probes(readiness=(Probe(path="/health"), Probe(path="/v1/models"), token), liveness=token, canary=token)

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """Until it is ready it refuses connections. A server with another model under its port is not ours."""
        if reply.status is None:
            return Health.SILENT
        if path == "/v1/models":
            return Health.READY if reply.status == 200 and spec.name in listed(reply.body) else Health.SILENT
        return Health.READY if reply.status == 200 else Health.SILENT

    def api(self, spec: ModelSpec) -> EngineApi:
        """It insists on the model's name; which paths it has depends on whether it makes text or vectors."""
        pooling = _options(spec).runner == "pooling"
        closed = _DEVELOPMENT if _options(spec).sleep else frozenset[str]()
        return EngineApi(paths=_POOLING if pooling else _TEXT, hints=_HINTS, model=spec.name, closed=closed)

    def load_probe(self, spec: ModelSpec) -> Probe | None:
        """Its metrics: `/load` is always 0 unless a flag switches it on."""
        return Probe(path="/metrics")

    def read_load(self, spec: ModelSpec, reply: ProbeReply) -> EngineLoad | None:
        """Over all its engines where it has several. The cache's use has had two names."""
        running = gauge(reply.body, "vllm:num_requests_running") if reply.status == 200 else []
        if not running:
            return None
        waiting = gauge(reply.body, "vllm:num_requests_waiting")
        cache = gauge(reply.body, "vllm:kv_cache_usage_perc") or gauge(reply.body, "vllm:gpu_cache_usage_perc")
        return EngineLoad(running=int(sum(running)), waiting=int(sum(waiting)), cache=max(cache, default=None))

    def naps(self, spec: ModelSpec) -> Naps | None:
        """Level 2 has its weights read again between waking their memory and that of the cache."""
        level = _options(spec).sleep
        if not level:
            return None
        fall = _order(f"/sleep?level={level}&mode=wait", _FALL_ASLEEP)
        wake: tuple[Probe, ...] = (_order("/wake_up", _WAKE_UP),)
        if level == 2:
            reload = Probe(path="/collective_rpc", body=_json(method="reload_weights"), timeout=_WAKE_UP)
            wake = (_order("/wake_up?tags=weights", _WAKE_UP), reload, _order("/wake_up?tags=kv_cache", _WAKE_UP))
        return Naps(level=level, sleep=(fall,), wake=wake, asks=Probe(path="/is_sleeping", timeout=_ASKED))

    def read_nap(self, reply: ProbeReply) -> bool | None:
        """`{"is_sleeping": true}`; in development mode only."""
        try:
            answer = json.loads(reply.body)["is_sleeping"] if reply.status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, bool) else None

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """It ends with 0 when its engine has died, too: an end that nobody asked for is a failure whatever the code."""
        if not was_ready and status.signal is None:
            cause = match_exit(_FAILURES, log_tail)
            if cause is not None:
                return cause
        cause = default_exit(status, log_tail, was_ready=was_ready)
        if status.code == 0 or any(_ENGINE_DIED.search(line) for line in log_tail):
            why = f"its engine process died, and the API server ended after it ({status})"
            return ExitCause(kind=ExitKind.CRASHED, message=why, hint="its log has more, on lines of EngineCore")
        return cause


_USUAL = VllmOptions()


def _options(spec: ModelSpec) -> VllmOptions:
    chosen = spec.options.get("vllm")
    return chosen if isinstance(chosen, VllmOptions) else _USUAL


def _adapters(options: VllmOptions) -> Iterator[tuple[str, str]]:
    """Name and path of each."""
    for entry in options.lora:
        name, _, path = entry.partition("=")
        yield name, path


def _served_name(spec: ModelSpec, options: VllmOptions) -> str:
    """What the base is called: a name that is its own and an adapter's is answered by the base."""
    return f"{spec.name}:base" if spec.name in dict(_adapters(options)) else spec.name


def _context(spec: ModelSpec, facts: ModelFacts) -> int:
    """It refuses more than the model was made for."""
    most = facts.shape.context_train if facts.shape else 0
    return min(spec.context, most) if most else spec.context


def _memory(spec: ModelSpec, facts: ModelFacts, options: VllmOptions) -> HubMemory:
    assert facts.shape is not None  # noqa: S101  (callers have looked)
    return hub_memory(
        facts.shape,
        context=_context(spec, facts),
        parallel=spec.parallel,
        batch=options.batch or _BATCH,
        cache_bytes=1 if options.kv_cache_dtype.startswith("fp8") else 2,
        cache=options.kv_cache,
        graphs=not options.eager,
        weights=Bytes(max(0, facts.shape.weights - options.cpu_offload) + _for_adapters(facts, options)),
    )


def _for_adapters(facts: ModelFacts, options: VllmOptions) -> int:
    """Bytes that adapters take: room for the highest rank is made in each, and for modules that they leave as they are."""
    shapes = [beside.shape for beside in facts.companions.values() if beside.shape]
    most = options.lora_rank or _LEAST_RANK
    return sum(2 * shape.weights * max(1, -(-most // max(1, shape.rank))) for shape in shapes)


def _by_hand(spec: ModelSpec, options: VllmOptions) -> VramEstimate | None:
    if spec.vram == "auto":
        return None
    weights = spec.vram if options.sleep == 1 else 0  # of a model that has not been looked into they may be nearly all of it
    return _fixed(spec.vram, Bytes(_PROGRAM + options.cpu_offload + weights), options, counts=(2, 4, 8))


def _fixed(size: Bytes, host: Bytes, options: VllmOptions, *, counts: tuple[int, ...]) -> VramEstimate:
    """What the config says, whatever would be worked out."""
    even = {count: Bytes(-(-size // count)) for count in counts}
    basis = f"vram: {format_bytes(size)} in the config"
    asleep = _asleep(options)
    return VramEstimate(total=size, basis=basis, host=host, on_host=size, even=even, elastic=True, asleep=asleep)


def _asleep(options: VllmOptions) -> Bytes | None:
    if not options.sleep:
        return None
    return Bytes(_ASLEEP + (0 if options.eager else _GRAPHS_ASLEEP)) if options.asleep is None else options.asleep


def _cpu_cache(cache: Bytes, options: VllmOptions) -> int:
    """GiB of RAM for its cache, of which it takes whole ones only."""
    return max(1, -(-(options.kv_cache or cache) // GIB))


def _memory_flags(placement: Placement, options: VllmOptions) -> Iterator[str]:
    """Its promise as a share of each card: rounded down, less what a process takes of a card before it counts."""
    if not placement.gpus:
        return
    shares = [
        max(1, (placement.reserved[gpu] - DEVICE_CONTEXT) * _SHARE_STEP // placement.whole[gpu])
        for gpu in placement.gpus
        if placement.whole.get(gpu)
    ]
    if shares:
        yield from ("--gpu-memory-utilization", f"{min(shares) / _SHARE_STEP:.4f}")
    if options.kv_cache is not None:
        yield from ("--kv-cache-memory-bytes", str(options.kv_cache))
    if len(placement.gpus) > 1:
        yield from ("--tensor-parallel-size", str(len(placement.gpus)))


def _option_flags(options: VllmOptions) -> Iterator[str]:
    defaults = VllmOptions()
    valued: tuple[tuple[str, object, object], ...] = (
        ("--kv-cache-dtype", options.kv_cache_dtype, defaults.kv_cache_dtype),
        ("--dtype", options.dtype, defaults.dtype),
        ("--quantization", options.quantization, None),
        ("--max-num-batched-tokens", options.batch, None),
        ("--cpu-offload-gb", f"{options.cpu_offload / GIB:.3f}", "0.000"),
        ("--runner", options.runner, defaults.runner),
        ("--convert", options.convert, defaults.convert),
        ("--tool-call-parser", options.tool_call_parser, None),
        ("--reasoning-parser", options.reasoning_parser, None),
        ("--chat-template", options.chat_template, None),
        ("--revision", options.revision, None),
        ("--load-format", options.load_format, None),
        ("--max-lora-rank", options.lora_rank, None),
    )
    for flag, value, default in valued:
        if value != default:
            yield from (flag, str(value))
    if options.tool_call_parser:
        yield "--enable-auto-tool-choice"
    if options.trust_remote_code:
        yield "--trust-remote-code"
    if options.eager:
        yield "--enforce-eager"
    if options.lora:
        yield from ("--enable-lora", "--lora-modules", *options.lora)


def _canary(spec: ModelSpec) -> Probe:
    """One token, or one vector where it makes those."""
    if _options(spec).runner == "pooling":
        return Probe(path="/v1/embeddings", body=_json(model=spec.name, input="a"), timeout=_WARM_UP)
    return Probe(path="/v1/completions", body=_json(model=spec.name, prompt="a", max_tokens=1, temperature=0), timeout=_WARM_UP)


def _order(path: str, limit: Seconds) -> Probe:
    """A POST that says all in its path."""
    return Probe(path=path, body=b"{}", timeout=limit)


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


BACKEND = Vllm()
