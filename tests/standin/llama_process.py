"""What surrounds the stand-in's HTTP: knobs, log lines, the mark file, and the ways to misbehave as a process."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import NoReturn

STARTED = time.monotonic()


def _env(name: str) -> str | None:
    return os.environ.get(f"STANDIN_{name}") or None


def _number(name: str, default: float = 0.0) -> float:
    return float(_env(name) or default)


def _on(name: str) -> bool:
    return (_env(name) or "0") not in ("0", "false", "no")


@dataclass(frozen=True, slots=True)
class Knobs:
    """The environment variables `STANDIN_…`, read; llama_server.py says what each does."""

    load_s: float = field(default_factory=lambda: _number("LOAD_S"))
    token_s: float = field(default_factory=lambda: _number("TOKEN_S"))
    answer_tokens: int = field(default_factory=lambda: int(_number("ANSWER_TOKENS", 16)))
    crash_after_tokens: int = field(default_factory=lambda: int(_number("CRASH_AFTER_TOKENS")))
    crash_on_request: int = field(default_factory=lambda: int(_number("CRASH_ON_REQUEST")))
    crash_on_text: str | None = field(default_factory=lambda: _env("CRASH_ON_TEXT"))
    crash_at_start: str | None = field(default_factory=lambda: _env("CRASH_AT_START"))
    crash_while_loading: str | None = field(default_factory=lambda: _env("CRASH_WHILE_LOADING"))
    ignore_term: bool = field(default_factory=lambda: _on("IGNORE_TERM"))
    hang_after_ready_s: float | None = field(default_factory=lambda: float(found) if (found := _env("HANG_AFTER_READY")) else None)
    dead_after_ready_s: float | None = field(default_factory=lambda: float(found) if (found := _env("DEAD_AFTER_READY")) else None)
    hang_all: bool = field(default_factory=lambda: _on("HANG_ALL"))
    never_ready: bool = field(default_factory=lambda: _on("NEVER_READY"))
    touch: str | None = field(default_factory=lambda: _env("TOUCH"))
    fork_grandchild_s: float = field(default_factory=lambda: _number("FORK_GRANDCHILD"))
    log_flood: int = field(default_factory=lambda: int(_number("LOG_FLOOD")))
    bind_late_s: float = field(default_factory=lambda: _number("BIND_LATE_S"))
    wrong_port: int | None = field(default_factory=lambda: int(found) if (found := _env("WRONG_PORT")) else None)
    mark_file: str | None = field(default_factory=lambda: _env("MARK_FILE"))
    alloc_mib: int = field(default_factory=lambda: int(_number("ALLOC_MIB")))
    gpu_mib: float = field(default_factory=lambda: _number("GPU_MIB"))
    gpu_weights_mib: float = field(default_factory=lambda: _number("GPU_WEIGHTS_MIB"))


def say(text: str) -> None:
    """Write one line to stderr, as llama-server does. A pipe that nobody reads stops us, as it stops the real one."""
    data = f"{text}\n".encode()
    while data:
        try:
            data = data[os.write(2, data) :]
        except OSError:  # whoever read it is gone; llama-server goes on serving too
            return


def log(level: str, text: str, *, at: str = "", part: str = "srv") -> None:
    """One log line in llama-server's shape: minutes, seconds, milli- and microseconds since start, level, part, function."""
    seconds, micros = divmod(int((time.monotonic() - STARTED) * 1e6), 1_000_000)
    stamp = f"{seconds // 60}.{seconds % 60:02d}.{micros // 1000:03d}.{micros % 1000:03d}"
    origin = f"{part:<4} {at:>12}: " if at else ""
    say(f"{stamp} {level} {origin}{text}")


class Marks:
    """Appends to the mark file one line per event, each beginning with our pid; one write call each, so lines never mix."""

    def __init__(self, path: str | None) -> None:
        self._descriptor = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, text: str) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, f"{os.getpid()} {text}\n".encode())


def leave(code: int) -> NoReturn:
    """End at once, with no clean-up that could print or wait."""
    os._exit(code)


def crash(how: str) -> NoReturn:
    """Die as `how` says: an exit code, a signal as a negative number, or `oom` for a CUDA allocation that failed."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "oom":
        _say_out_of_memory()
        leave(1)
    number = int(how)
    if number < 0:
        if -number != signal.SIGKILL:
            signal.signal(-number, signal.SIG_DFL)
        os.kill(os.getpid(), -number)
    leave(number)


def _say_out_of_memory() -> None:
    log("E", "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8192.00 MiB on device 0: cudaMalloc failed: out of memory")
    log("E", "alloc_tensor_range: failed to allocate CUDA0 buffer of size 8589934592")
    log("E", "llama_model_load: error loading model: unable to allocate CUDA0 buffer")
    log("E", "llama_model_load_from_file_impl: failed to load model")
    log("E", "exiting due to model loading error", at="llama_server")


def take_default_signals(knobs: Knobs) -> None:
    """While loading, llama-server has no handlers: SIGTERM and SIGINT kill it. With the knob, neither ever does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if knobs.ignore_term else signal.SIG_DFL)


def fork_grandchild(seconds: float, marks: Marks) -> None:
    """Leave behind a process in a session of its own that holds our stdout and stderr for `seconds`."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork() == 0:
        marks.write("grandchild")
        time.sleep(seconds)
    leave(0)


def start_log_flood(bytes_per_second: int) -> None:
    line = "x" * 99
    lines_per_tick = max(1, bytes_per_second // (100 * 50))

    def flood() -> None:
        while True:
            for _ in range(lines_per_tick):
                say(line)
            time.sleep(0.02)

    threading.Thread(target=flood, daemon=True, name="log-flood").start()


def allocate(mib: int) -> bytes:
    """Memory that is really there: every page is written."""
    return b"\x01" * (mib * 2**20)


def hold_on_gpus(size: int, shares: list[float]) -> None:
    """Hold `size` bytes on the cards of the fake libnvidia-ml.so.1 that CUDA_VISIBLE_DEVICES names, divided as `shares` says."""
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    folder = os.environ.get("FAKE_NVML_PROCS")
    if not (size and cards and folder):
        return
    parts = shares if len(shares) == len(cards) else [1.0] * len(cards)
    rows = [f"{card} {int(size * part / sum(parts))}\n" for card, part in zip(cards, parts, strict=True)]
    fresh = os.path.join(folder, f"{os.getpid()}.new")
    with open(fresh, "w") as file:
        file.writelines(rows)
    os.replace(fresh, os.path.join(folder, str(os.getpid())))


def complain(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(1)
