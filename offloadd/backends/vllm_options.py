"""Options of `vllm serve` as the config has them, and as its command line wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from offloadd.backends.hub_memory import GIB
from offloadd.state.desired import BackendOptions, ModelSpec
from offloadd.units import Bytes


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


LEAST_RANK = 16
"""The highest rank of an adapter, where nothing is said."""
_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""Those that every vLLM of late takes for --max-lora-rank."""
_USUAL = VllmOptions()


def options_of(spec: ModelSpec) -> VllmOptions:
    """What the model says, or the usual."""
    chosen = spec.options.get("vllm")
    return chosen if isinstance(chosen, VllmOptions) else _USUAL


def allowed_rank(rank: int) -> int:
    """The least that may be asked for, so that an adapter of this rank fits."""
    return next((each for each in _RANKS if each >= rank), rank)


def adapters(options: VllmOptions) -> Iterator[tuple[str, str]]:
    """Name and path of each."""
    for entry in options.lora:
        name, _, path = entry.partition("=")
        yield name, path


def served_name(spec: ModelSpec, options: VllmOptions) -> str:
    """What the base is called: a name that is its own and an adapter's is answered by the base."""
    return f"{spec.name}:base" if spec.name in dict(adapters(options)) else spec.name


def option_flags(options: VllmOptions) -> Iterator[str]:
    """All of them but those that memory follows from."""
    valued: tuple[tuple[str, object, object], ...] = (
        ("--kv-cache-dtype", options.kv_cache_dtype, _USUAL.kv_cache_dtype),
        ("--dtype", options.dtype, _USUAL.dtype),
        ("--quantization", options.quantization, None),
        ("--max-num-batched-tokens", options.batch, None),
        ("--cpu-offload-gb", f"{options.cpu_offload / GIB:.3f}", "0.000"),
        ("--runner", options.runner, _USUAL.runner),
        ("--convert", options.convert, _USUAL.convert),
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
