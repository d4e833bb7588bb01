#!/usr/bin/env python3
"""A stand-in for llama-server: its command line, its HTTP, its log lines, its exits; but no model, and faults on demand.

It starts in a fraction of a second, needs any file that begins like a GGUF file, and behaves as build b10434 was recorded to;
`tests/conformance/` holds it to those recordings and runs one suite against it and against the real program. An answer has as many
tokens as `max_tokens` says.

Knobs are environment variables, so that `env:` of a model in offloadd's config sets them:

    STANDIN_LOAD_S=2             take so long to load; 503 meanwhile
    STANDIN_TOKEN_S=0.05         time per token
    STANDIN_ANSWER_TOKENS=16     length of an answer when the request has no max_tokens; it then ends with `stop`
    STANDIN_CRASH_AT_START=3     end before the port opens: an exit code, `-11` for a signal, or `oom` (exit 1, CUDA's text)
    STANDIN_CRASH_WHILE_LOADING  the same, when loading would have ended
    STANDIN_CRASH_AFTER_TOKENS=7 abort (SIGABRT) when so many tokens were generated in all
    STANDIN_CRASH_ON_REQUEST=2   die by SIGSEGV when the second request to generate arrives
    STANDIN_CRASH_ON_TEXT=word   the same, at a request that holds the word
    STANDIN_IGNORE_TERM=1        ignore SIGTERM and SIGINT, always
    STANDIN_NEVER_READY=1        answer 503 for ever
    STANDIN_HANG_AFTER_READY=5   "healthy liar": five seconds after it is ready, /health and /v1/models answer, all else hangs;
                                 SIGTERM does nothing, a second one ends it
    STANDIN_DEAD_AFTER_READY=5   five seconds after it is ready nothing is computed any more: whatever is asked by POST hangs, and
                                 /health, /v1/models and /slots answer on
    STANDIN_TOUCH=/some/file     look at that file once it is ready, in a thread that nothing waits for
    STANDIN_HANG_ALL=1           accept connections, never answer anything
    STANDIN_BIND_LATE_S=2        open the port so late
    STANDIN_WRONG_PORT=0         listen on that port instead of --port; 0 takes any
    STANDIN_FORK_GRANDCHILD=600  leave a process behind, in a session of its own, that holds stdout and stderr for so many seconds
    STANDIN_LOG_FLOOD=1000000    write so many bytes of log per second
    STANDIN_ALLOC_MIB=256        allocate and touch so much memory while loading
    STANDIN_GPU_MIB=10240        hold so much on the cards of CUDA_VISIBLE_DEVICES, growing while it loads and divided by
                                 --tensor-split: cards of the fake libnvidia-ml.so.1 that FAKE_NVML_PROCS belongs to
    STANDIN_MARK_FILE=/some/file append a line per event, each beginning with the pid: `start`, `grandchild` (its own pid), `ready`,
                                 `term`, `request METHOD PATH`, `completed stream|plain TOKENS`, `cancelled stream|plain TOKENS`
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from llama_flags import BadArgument, Options, parse
from llama_gguf import BadModel, ModelFile, read
from llama_process import (
    Knobs,
    Marks,
    allocate,
    complain,
    crash,
    fork_grandchild,
    hold_on_gpus,
    leave,
    log,
    say,
    start_log_flood,
    take_default_signals,
)

_VERSION = "version: 0.1.0-dev (build 1, commit 7e4c0a9)\nbuilt with a stand-in for tests"
_BACKLOG = 512
_LOAD_STEPS = 4


def main(argv: list[str]) -> None:
    """Do in llama-server's order: arguments, port, model, serve."""
    options = _read_options(argv)
    knobs = Knobs()
    marks = Marks(knobs.mark_file)
    marks.write("start")
    take_default_signals(knobs)
    if knobs.fork_grandchild_s:
        fork_grandchild(knobs.fork_grandchild_s, marks)
    if knobs.crash_at_start is not None:
        crash(knobs.crash_at_start)
    if knobs.log_flood:
        start_log_flood(knobs.log_flood)
    log("I", "common_params_print_info: verbosity = 3 (adjust with the `-lv N` CLI arg)", at="common_param", part="cmn")
    time.sleep(knobs.bind_late_s)
    listener = _listen(options, knobs)
    if knobs.hang_all:
        while True:
            signal.pause()
    log("I", f"loading model '{options.model}'", at="load_model")
    file = _read_model(options)
    _serve(options, knobs, marks, file, listener)


def _read_options(argv: list[str]) -> Options:
    try:
        options = parse(argv)
    except BadArgument as refusal:
        complain(str(refusal))
    if "--help" in options.switches:
        print(__doc__)
        sys.exit(0)
    if "--version" in options.switches:
        print(_VERSION, file=sys.stderr)
        sys.exit(0)
    if options.model is None:
        complain("the stand-in has no router mode: --model is needed")
    return options


def _listen(options: Options, knobs: Knobs) -> socket.socket:
    """Open the port, before the model is even looked at."""
    port = options.port if knobs.wrong_port is None else knobs.wrong_port
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, port))
        listener.listen(_BACKLOG)
    except OSError:
        where = f"hostname: {options.host}, port: {options.port}"
        log("E", f"couldn't bind HTTP server socket, {where}", at="start")
        log("I", "operator(): cleaning up before exit...", at="operator()")
        log("E", "exiting due to HTTP server error", at="llama_server")
        leave(1)
    return listener


def _read_model(options: Options) -> ModelFile:
    path = options.model or ""
    try:
        found = read(path)
        _refuse_cache(options, path)
        return found
    except BadModel as problem:
        # With --fit on, the real one tries twice, and so says this twice.
        for _ in range(1 if options.values.get("--fit") == "off" else 2):
            _say_bad_model(str(problem), path)
        log("E", f"failed to load model '{path}'", at="common_init_", part="cmn")
        log("E", f"failed to load model, '{path}'", at="load_model")
        log("I", "operator(): cleaning up before exit...", at="operator()")
        log("E", "exiting due to model loading error", at="llama_server")
        leave(1)


def _refuse_cache(options: Options, path: str) -> None:
    """Of all that creating its context could fail of, what the command line alone decides."""
    if options.values.get("--flash-attn") != "off" or options.values.get("--cache-type-v", "f16") in ("f16", "f32", "bf16"):
        return
    log("E", "llama_init_from_model: quantized V cache requires flash_attn to be enabled")
    log("E", f"common_init_: failed to create context with model '{path}'", at="common_init_", part="cmn")
    log("E", f"failed to create_context with model '{path}'", at="load_model")
    log("I", "operator(): cleaning up before exit...", at="operator()")
    log("E", "exiting due to model loading error", at="llama_server")
    leave(1)


def _say_bad_model(problem: str, path: str) -> None:
    log("E", problem)
    if not problem.startswith("llama_model_load"):
        log("E", f"llama_model_load: error loading model: llama_model_loader: failed to load model from {path}")
    log("E", "llama_model_load_from_file_impl: failed to load model")


def _serve(options: Options, knobs: Knobs, marks: Marks, file: ModelFile, listener: socket.socket) -> None:
    # Only now: clients can connect already, and a bad command line or model has ended us long before.
    import asyncio

    from aiohttp import web
    from llama_engine import Engine
    from llama_http import Api

    engine = Engine(options, knobs, marks, file)

    async def load() -> object:
        """Everything between the open port and the first 200; what it returns is kept, since it may be the model's memory."""
        memory = await asyncio.to_thread(allocate, knobs.alloc_mib) if knobs.alloc_mib else b""
        for step in range(1, _LOAD_STEPS + 1):
            hold_on_gpus(int(knobs.gpu_mib * 2**20 * step / _LOAD_STEPS), options.tensor_split)
            await asyncio.sleep(knobs.load_s / _LOAD_STEPS)
        if knobs.crash_while_loading is not None:
            crash(knobs.crash_while_loading)
        if knobs.never_ready:
            await asyncio.Event().wait()
        slots = f"n_slots = {options.slots}, n_ctx_slot = {engine.n_ctx}, kv_unified = '{str(options.unified).lower()}'"
        log("I", f"initializing, {slots}", at="load_model")
        engine.become_ready()
        marks.write("ready")
        if knobs.touch is not None:
            threading.Thread(target=os.path.exists, args=(knobs.touch,), daemon=True, name="touch").start()
        log("I", "model loaded", at="llama_server")
        log("I", f"listening on http://{options.host}:{listener.getsockname()[1]}", at="llama_server")
        return memory

    async def run() -> None:
        runner = web.AppRunner(Api(engine).app(), access_log=None, keepalive_timeout=5, handle_signals=False)
        await runner.setup()
        server = await asyncio.get_running_loop().create_server(runner.server, sock=listener, backlog=_BACKLOG)
        memory = await load()
        told = asyncio.Event()
        if not knobs.ignore_term:
            _handle_signals(told)
        await told.wait()
        log("I", "operator(): cleaning up before exit...", at="operator()")
        marks.write("term")
        engine.stopping = True
        server.close()
        while engine.in_flight or engine.hung:
            await asyncio.sleep(0.02)
        del memory
        leave(0)

    def _handle_signals(told: asyncio.Event) -> None:
        def on_signal() -> None:
            if told.is_set():
                say("Received second interrupt, terminating immediately.")
                leave(1)
            told.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    asyncio.run(run())


if __name__ == "__main__":
    main(sys.argv[1:])
