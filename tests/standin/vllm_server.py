#!/usr/bin/env python3
"""A stand-in for vLLM 0.32: its command line, its processes, its HTTP, its log lines, its ends; but no model, and faults on demand.

    vllm_server.py serve MODEL [options of `vllm serve`]

It starts what the real one starts: an API server, an EngineCore below it, a Worker below that, all in one process group; the GPU's
memory is the Worker's. `tests/conformance/` holds its answers to recordings of the real one.

Knobs are environment variables:

    STANDIN_LOAD_S=2             take so long to load; connections are refused meanwhile, though the port is bound
    STANDIN_TOKEN_S=0.05         time per token
    STANDIN_ANSWER_TOKENS=16     length of an answer when the request names none; it then ends with `stop`
    STANDIN_CRASH_AT_START=3     end at once with this code
    STANDIN_CRASH_WHILE_LOADING  the engine fails while it loads; `oom` with CUDA's text, `free` for want of free memory
    STANDIN_CRASH_AFTER_TOKENS=7 the EngineCore dies when so many tokens were generated in all; the API server then ends with 0
    STANDIN_CRASH_ON_REQUEST=2   the API server dies by SIGSEGV when the second request to generate arrives
    STANDIN_IGNORE_TERM=1        ignore SIGTERM and SIGINT, always
    STANDIN_NEVER_READY=1        load for ever
    STANDIN_HANG_AFTER_READY=5   so long after it is ready, /health and /metrics answer and nothing is generated any more
    STANDIN_TERM=hang            SIGTERM with requests in flight: `abort` (the default), `error`, or `hang` until they have left
    STANDIN_TERM_WHILE_LOADING   `lost` (the default): it goes on and serves; `hang`: neither ready nor gone; `die`: at once
    STANDIN_STEAL_PORT=1         never listen at the end, as when another has taken the port meanwhile
    STANDIN_GPU_MIB=10240        hold so much on the cards of CUDA_VISIBLE_DEVICES, growing while it loads
    STANDIN_GPU_WEIGHTS_MIB=600  hold what vLLM's rule says: its share of each card, or weights and the cache that was asked for
    STANDIN_SLEEP_KEEPS=1        asleep, give no memory back though it says so
    STANDIN_SLEEP=fails          `fails` with 500, or `hangs` for ever
    STANDIN_WAKE=fails           the same; `dies`: the engine runs out of memory
    STANDIN_WAKE_S=1.5           take so long to wake
    STANDIN_LEAVINGS=1           make what it makes in TMPDIR and /dev/shm, and leave it there however it ends
    STANDIN_MARK_FILE=/some/file append a line per event, each beginning with the pid: `start`, `engine`, `worker`, `ready`, `term`,
                                 `request METHOD PATH`, `completed TOKENS`, `cancelled TOKENS`, `sleep LEVEL`, `wake TAGS`, `reload`
                                 and `made PATH`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time

from llama_process import Knobs, Marks, leave
from vllm_engine import start_engine
from vllm_flags import BadArgument, Options, parse


def main(argv: list[str]) -> None:
    """Do in vLLM's order: imports, arguments, port, engine, serve."""
    if argv[:1] != ["serve"]:
        print("usage: vllm [-h] [-v] {chat,complete,serve,bench,collect-env,run-batch} ...", file=sys.stderr)
        sys.exit(2)
    knobs = Knobs()
    marks = Marks(knobs.mark_file)
    marks.write("start")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if knobs.ignore_term else signal.SIG_DFL)
    if knobs.crash_at_start is not None:
        leave(int(knobs.crash_at_start))
    time.sleep(knobs.load_s / 4)  # imports: a signal kills it at once
    options = _read_options(argv[1:])
    listener = _bind(options)
    told = _heed_signals_while_loading(knobs)
    engine = start_engine(options, knobs)
    if engine is None:
        say_error("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}")
        leave(1)
    while told and os.environ.get("STANDIN_TERM_WHILE_LOADING") == "hang":
        time.sleep(0.1)
    from vllm_http import serve

    serve(options, knobs, marks, listener, engine)


def say(text: str, part: str = "APIServer") -> None:
    """One line of vLLM's own log, on stdout."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    os.write(1, f"({part} pid={os.getpid()}) INFO {stamp} [standin.py:1] {text}\n".encode())


def say_error(text: str) -> None:
    """The end of a traceback, on stderr."""
    os.write(2, f"Traceback (most recent call last):\n{text}\n".encode())


def _read_options(argv: list[str]) -> Options:
    try:
        options = parse(argv)
    except BadArgument as problem:
        print(f"usage: vllm serve [model_tag] [options]\n{problem}", file=sys.stderr)
        sys.exit(2)
    key = os.environ.get("VLLM_API_KEY")
    if key and not options.keys:
        options.values["--api-key"] = [key]
    _refuse_what_it_refuses(options)
    return options


def _refuse_what_it_refuses(options: Options) -> None:
    if "/" in os.environ.get("VLLM_PORT", ""):
        say_error(f"ValueError: VLLM_PORT '{os.environ['VLLM_PORT']}' appears to be a URI.")
        leave(1)
    if options.sleeps and os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        say_error("  Value error, Sleep mode is not supported on current platform.")
        leave(1)
    if options.model.endswith(".gguf"):
        say_error(f"OSError: It looks like the config file at '{options.model}' is not a valid JSON file.")
        leave(1)
    if options.model.startswith("/") and not os.path.isdir(options.model):
        said = f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{options.model}'. Use `repo_type` argument"
        say_error(f"huggingface_hub.errors.HFValidationError: {said}")
        leave(1)
    for path in options.adapters.values():
        _refuse_adapter(path, options.number("--max-lora-rank", 16))


def _refuse_adapter(path: str, most: int) -> None:
    try:
        with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
            rank = json.load(file)["r"]
    except (OSError, ValueError, KeyError) as problem:
        say_error(f"ValueError: Loading lora {path} failed: {problem}")
        leave(1)
    if rank > most:
        say_error(f"ValueError: LoRA rank {rank} is greater than max_lora_rank {most}.")
        leave(1)


def _bind(options: Options) -> socket.socket:
    """The address is taken early, and nobody listens there until all is loaded."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except OSError:
        say_error("OSError: [Errno 98] Address already in use")
        leave(1)
    return listener


def _heed_signals_while_loading(knobs: Knobs) -> list[int]:
    """A SIGTERM that comes now is lost, or leaves it hanging, or ends it; by the knob."""
    told: list[int] = []
    how = os.environ.get("STANDIN_TERM_WHILE_LOADING", "lost")
    if how != "die" and not knobs.ignore_term:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda given, _frame: leave(1) if told and how == "hang" else told.append(given))
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
