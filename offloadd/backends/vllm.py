"""vLLM's `vllm serve`: models from a hub or a folder, several processes, one process group. Facts from 0.32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from offloadd.backends.base import HubEngine, listed, own_folder, read_json, visible
from offloadd.backends.gauges import gauge
from offloadd.backends.vllm_failures import explain_exit
from offloadd.backends.vllm_memory import context_of, cpu_cache, estimate, memory_flags
from offloadd.backends.vllm_options import LEAST_RANK, VllmOptions, adapters, allowed_rank, option_flags, options_of, served_name
from offloadd.backends.words import fill
from offloadd.state.desired import BackendOptions, Engine, ModelSpec
from offloadd.state.found import Found
from offloadd.state.launch import (
    Endpoint,
    EngineApi,
    EngineLoad,
    ExitCause,
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
from offloadd.units import Seconds

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

_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"}
"""It reports to nobody; and it listens on ports of its own for its processes, none of which may be reached from elsewhere."""

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
        return replace(
            chosen,
            lora=(*chosen.lora, f"{found.name}={found.path}"),
            lora_rank=max(allowed_rank(rank), chosen.lora_rank or LEAST_RANK),
            # After a deep sleep the base is read again, and nobody says that the adapter is.
            sleep=1 if chosen.sleep else 0,
        )

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """Adapters by their paths; what vLLM is to look for by itself is its own affair."""
        return tuple(path for _, path in adapters(options_of(spec)) if path.startswith("/"))

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
        """What it needs at least; it then takes all of its promise. None for a hub id that has not been downloaded."""
        return estimate(spec, facts)

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """`vllm serve` on one loopback port, with its part of each card as a share of the whole."""
        options = options_of(spec)
        argv = [
            *engine.command,
            facts.path,
            *("--served-model-name", served_name(spec, options)),
            *("--host", endpoint.host),
            *("--port", str(endpoint.port)),
            *("--max-model-len", str(context_of(spec, facts))),
            *("--max-num-seqs", str(spec.parallel)),
            # One line for each probe would fill its log.
            *("--disable-access-log-for-endpoints", "/health,/metrics,/v1/models"),
            "--enable-prompt-tokens-details",
            *memory_flags(placement, options),
            *option_flags(options),
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
            env = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache(spec, facts)), **env}
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
        pooling = options_of(spec).runner == "pooling"
        closed = _DEVELOPMENT if options_of(spec).sleep else frozenset[str]()
        return EngineApi(paths=_POOLING if pooling else _TEXT, hints=_HINTS, model=spec.name, closed=closed, lasting=True)

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
        level = options_of(spec).sleep
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
            answer = read_json(reply.body)["is_sleeping"] if reply.status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None
        return answer if isinstance(answer, bool) else None

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """It ends with 0 when its engine has died, too: an end that nobody asked for is a failure whatever the code."""
        return explain_exit(status, log_tail, was_ready=was_ready)


def _canary(spec: ModelSpec) -> Probe:
    """One token, or one vector where it makes those."""
    if options_of(spec).runner == "pooling":
        return Probe(path="/v1/embeddings", body=_json(model=spec.name, input="a"), timeout=_WARM_UP)
    return Probe(path="/v1/completions", body=_json(model=spec.name, prompt="a", max_tokens=1, temperature=0), timeout=_WARM_UP)


def _order(path: str, limit: Seconds) -> Probe:
    """A POST that says all in its path."""
    return Probe(path=path, body=b"{}", timeout=limit)


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


BACKEND = Vllm()
