"""What llama-server writes before it dies, and what that means."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from offloadd.backends.base import ExitPattern, default_exit, match_exit
from offloadd.state.launch import ExitCause, ExitKind, ExitStatus

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
        # Before the lines on memory: it says next that it cannot create its context, as it does for want of that.
        re.compile(r"quantized V cache requires flash_attn|V cache quantization requires flash_attn"),
        ExitKind.BAD_OPTION,
        "a quantized cache_type_v needs flash attention, which is off",
        "leave llamacpp.flash_attention out or set it to on, or cache_type_v to f16",
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
_GPU_FAILED = (
    ExitPattern(
        re.compile(r"CUDA error: out of memory"),
        ExitKind.OUT_OF_MEMORY,
        "the GPU had no more memory while it worked",
        "lower context, parallel or llamacpp.ubatch, or raise vram",
    ),
    ExitPattern(
        re.compile(r"CUDA error: (?P<why>.+)"),
        ExitKind.CRASHED,
        "the GPU gave up on it: {why}",
        "if it stays so, see the kernel's log for the driver's own words (Xid), and its log for the place",
    ),
)
"""What it writes before it aborts, whenever that is."""
_WRONG_PROCESSOR = ExitCause(
    kind=ExitKind.NOT_STARTED,
    message="this llama-server was built for instructions that this processor lacks (SIGILL)",
    hint="use a llama-server built for this machine, or a portable one",
    permanent=True,
)


def explain_exit(status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
    """Every failed start is exit 1: only the text tells them apart."""
    if status.signal == signal.SIGILL and not was_ready:
        return _WRONG_PROCESSOR
    if status.signal is None and not was_ready:
        cause = match_exit(_FAILURES, log_tail)
        if cause is not None:
            return cause
    failed = match_exit(_GPU_FAILED, log_tail) if status.signal in (None, signal.SIGABRT) else None
    return failed or default_exit(status, log_tail, was_ready=was_ready)
