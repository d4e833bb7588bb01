"""What vLLM writes before it dies, and what that means. Facts from 0.32."""

from __future__ import annotations

import re
from collections.abc import Sequence

from offloadd.backends.base import ExitPattern, default_exit, match_exit
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus

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


def explain_exit(status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
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
