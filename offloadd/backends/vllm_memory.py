"""The memory of one vLLM: what it needs at least, and its promise as its command line wants it."""

from __future__ import annotations

from collections.abc import Iterator

from offloadd.backends.hub_memory import DEVICE_CONTEXT, GIB, HubMemory, hub_memory
from offloadd.backends.vllm_options import LEAST_RANK, VllmOptions, options_of
from offloadd.state.desired import ModelSpec
from offloadd.state.launch import ModelFacts, Placement, VramEstimate
from offloadd.units import Bytes, format_bytes

_PROGRAM = Bytes(2 * GIB)
"""RAM of its processes on a machine with GPUs: interpreters and libraries, three times over."""
_CPU_PROGRAM = Bytes(3 * GIB)
"""The same where it computes on the CPU: measured at 3.2 GB resident, shared pages counted twice."""
_BATCH = 2048
_SHARE_STEP = 10_000
_GRAPHS_ASLEEP = Bytes(GIB)
_ASLEEP = Bytes(GIB)
"""What a sleeping server still holds of each card, its context above all: an assumption, not measured. Graphs stay as well."""


def estimate(spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
    """What it needs at least; it then takes all of its promise. None for a hub id that has not been downloaded."""
    options = options_of(spec)
    if facts.shape is None:
        return _by_hand(spec, options)
    memory = _memory(spec, facts, options)
    host = Bytes(_PROGRAM + options.cpu_offload + (memory.weights if options.sleep == 1 else 0))
    on_host = Bytes(_CPU_PROGRAM + memory.weights + _whole_gib(memory.cache, options) * GIB)
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


def context_of(spec: ModelSpec, facts: ModelFacts) -> int:
    """It refuses more than the model was made for."""
    most = facts.shape.context_train if facts.shape else 0
    return min(spec.context, most) if most else spec.context


def cpu_cache(spec: ModelSpec, facts: ModelFacts) -> int:
    """GiB of RAM for its cache on the CPU."""
    options = options_of(spec)
    return _whole_gib(_memory(spec, facts, options).cache if facts.shape else Bytes(0), options)


def memory_flags(placement: Placement, options: VllmOptions) -> Iterator[str]:
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


def _memory(spec: ModelSpec, facts: ModelFacts, options: VllmOptions) -> HubMemory:
    assert facts.shape is not None  # noqa: S101  (callers have looked)
    return hub_memory(
        facts.shape,
        context=context_of(spec, facts),
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
    most = options.lora_rank or LEAST_RANK
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


def _whole_gib(cache: Bytes, options: VllmOptions) -> int:
    """GiB of RAM for its cache, of which it takes whole ones only."""
    return max(1, -(-(options.kv_cache or cache) // GIB))
