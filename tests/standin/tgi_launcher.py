#!/usr/bin/env python3
"""A stand-in for text-generation-launcher: its flags, its processes, its HTTP, its log lines; but no model, and faults on demand.

It starts what the real one starts: a download that ends, one shard per GPU, then a router, each in a process group of its own in
the launcher's session, so that a signal to the launcher's group reaches none of them. Options come from the environment too, under
plain names (PORT, HOSTNAME, …), as they do there. `tests/conformance/` holds its answers to TGI's own API description.

Knobs are environment variables:

    STANDIN_LOAD_S=2             take so long to load; connections are refused meanwhile
    STANDIN_TOKEN_S=0.05         time per token
    STANDIN_ANSWER_TOKENS=16     length of an answer when the request names none; it then ends with `eos_token`
    STANDIN_CRASH_AT_START=3     the launcher ends at once with this code
    STANDIN_CRASH_WHILE_LOADING  a shard ends while it loads: `oom` fails the warm-up instead, as too little memory does
    STANDIN_CRASH_AFTER_TOKENS=7 a shard dies when so many tokens were generated in all, and with it the whole
    STANDIN_CRASH_ON_REQUEST=2   the router dies when the second request to generate arrives
    STANDIN_IGNORE_TERM=1        launcher, shards and router ignore SIGTERM
    STANDIN_NEVER_READY=1        load for ever
    STANDIN_HANG_AFTER_READY=5   so long after it is ready, no request that generates gets any answer, and /health with them
    STANDIN_GPU_MIB=10240        hold so much on the cards of CUDA_VISIBLE_DEVICES, a part in each shard, growing while it loads
    STANDIN_GPU_WEIGHTS_MIB=600  hold so much for weights, and then whatever TGI's rule leaves for its cache (see tgi_memory.py)
    STANDIN_MARK_FILE=/some/file append a line per event, each beginning with the pid: `start`, `shard N`, `router`, `ready`,
                                 `term`, `request METHOD PATH`, `completed TOKENS`, `cancelled TOKENS`
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from llama_process import Knobs, Marks, hold_on_gpus, leave
from tgi_flags import BadArgument, Options, parse

_VERSION = "text-generation-launcher 3.3.7"
_LOAD_STEPS = 4
_TICK_S = 0.02
_NO_MEMORY = "RuntimeError: Not enough memory to handle {tokens} prefill tokens. You need to decrease `--max-batch-prefill-tokens`"


class Ended(Exception):
    """A child ended by itself; the text is what the launcher prints as its error."""


def main(argv: list[str]) -> None:
    """Do in the launcher's order: options, download, shards, router; then wait for the first of them to end, or for a signal."""
    options = _read_options(argv)
    knobs = Knobs()
    Marks(knobs.mark_file).write("start")
    if knobs.crash_at_start is not None:
        leave(int(knobs.crash_at_start))
    _Launcher(options, knobs).run()


def _read_options(argv: list[str]) -> Options:
    if "--version" in argv or "-V" in argv:
        print(_VERSION)
        sys.exit(0)
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        sys.exit(0)
    try:
        return parse(argv, os.environ)
    except BadArgument as problem:
        print(f"{problem}\n\nUsage: text-generation-launcher [OPTIONS]\n\nFor more information, try '--help'.", file=sys.stderr)
        sys.exit(2)


def say(target: str, text: str, level: str = "INFO") -> None:
    """One log line on stdout, in the compact shape."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".000000Z"
    os.write(1, f"{stamp} {level:>5} {target}: {text}\n".encode())


class _Launcher:
    """The parent of it all."""

    def __init__(self, options: Options, knobs: Knobs) -> None:
        self._options, self._knobs = options, knobs
        self._shards: list[int] = []
        self._router: int | None = None
        self._told = False
        self._marks = Marks(knobs.mark_file)

    def run(self) -> NoReturn:
        """Until it ends: 0 when asked to, 1 otherwise with `Error: …` on stderr."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if self._knobs.ignore_term else self._on_signal)
        try:
            self._start()
            while not self._told:
                self._check()
                time.sleep(_TICK_S)
        except Ended as problem:
            self._stop()
            print(f"Error: {problem}", file=sys.stderr)
            leave(1)
        self._marks.write("term")
        self._stop()
        leave(0)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._told = True

    def _start(self) -> None:
        model, at = self._options.model_id, "text_generation_launcher"
        say(at, f"Starting check and download process for {model}")
        os.waitpid(_fork(lambda: leave(0), self._knobs), 0)
        say(at, f"Successfully downloaded weights for {model}")
        for rank in range(self._options.num_shard):
            say(at, "Starting shard" if self._options.num_shard == 1 else f"Starting shard rank={rank}")
            self._shards.append(_fork(lambda rank=rank: _shard(rank, self._options, self._knobs), self._knobs))
        self._await_shards()
        if self._told:
            return
        say(at, "Starting Webserver")
        self._router = _fork(lambda: _router(self._options, self._knobs, self._shards), self._knobs)

    def _await_shards(self) -> None:
        began = time.monotonic()
        while not self._told and not all(_answers(self._options.shard_socket(rank)) for rank in range(len(self._shards))):
            self._check()
            time.sleep(_TICK_S)
        if not self._told:
            say("text_generation_launcher", f"Shard ready in {time.monotonic() - began:.6f}s")

    def _check(self) -> None:
        """A shard or a router that ends takes the whole with it."""
        for rank, pid in enumerate(self._shards):
            if _ended(pid):
                self._shards.remove(pid)
                if self._router is None:
                    say("text_generation_launcher", "Shard complete standard error output:", "ERROR")
                    say("text_generation_launcher", f"Shard {rank} failed to start", "ERROR")
                    raise Ended("ShardCannotStart")
                say("text_generation_launcher", f"Shard {rank} crashed", "ERROR")
                raise Ended("ShardFailed")
        if self._router is not None and _ended(self._router):
            self._router = None
            say("text_generation_launcher", "Webserver Crashed", "ERROR")
            raise Ended("WebserverFailed")

    def _stop(self) -> None:
        """The router first, then the shards; each is given the time of --graceful-termination-timeout."""
        at = "text_generation_launcher"
        if self._router is not None:
            say(at, "Terminating webserver")
            say(at, "Waiting for webserver to gracefully shutdown")
            self._end(self._router)
            say(at, "webserver terminated")
        say(at, "Shutting down shards")
        for pid in self._shards:
            say(at, "Terminating shard")
            self._end(pid)
            say(at, "shard terminated")

    def _end(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self._options.graceful_s
        while not _ended(pid):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(_TICK_S)


def _fork(work: Callable[[], None], knobs: Knobs) -> int:
    """A child in a process group of its own, which does the work and ends."""
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if knobs.ignore_term else signal.SIG_DFL)
        work()
    except BaseException as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
    finally:
        os._exit(1)


def _ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _shard(rank: int, options: Options, knobs: Knobs) -> None:
    """Load, then listen on the shard's socket; end when another instance has put its own in this one's place."""
    Marks(knobs.mark_file).write(f"shard {rank}")
    rendezvous = _rendezvous(options) if rank == 0 and options.num_shard > 1 else None
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[rank] if rank < len(cards) else ""
    for step in range(1, _LOAD_STEPS + 1):
        hold_on_gpus(int(knobs.gpu_mib * 2**20 * step / _LOAD_STEPS / options.num_shard), [])
        time.sleep(knobs.load_s / _LOAD_STEPS)
    if knobs.crash_while_loading not in (None, "oom"):
        print("Traceback (most recent call last):\nRuntimeError: weight model.embed_tokens.weight does not exist", file=sys.stderr)
        leave(1)
    while knobs.never_ready:
        time.sleep(1)
    path = options.shard_socket(rank)
    if os.path.exists(path):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        own = os.stat(path).st_ino
        while os.path.exists(path) and os.stat(path).st_ino == own:
            time.sleep(0.05)
    del rendezvous
    print("grpc: the server's socket was taken by another process", file=sys.stderr)
    leave(1)


def _rendezvous(options: Options) -> socket.socket:
    """Where shards meet: one port per instance."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((options.master_addr, options.master_port))
    except OSError:
        said = f"The server socket has failed to listen on port {options.master_port}"
        print(f"torch.distributed.DistNetworkError: {said}", file=sys.stderr)
        leave(1)
    listener.listen(8)
    return listener


def _router(options: Options, knobs: Knobs, shards: list[int]) -> None:
    """Warm up, then open the HTTP port: nothing listened there before."""
    at = "text_generation_router_v3"
    Marks(knobs.mark_file).write("router")
    _bind_once(options.prometheus_port)
    say(at, "Warming up model")
    if knobs.crash_while_loading == "oom":
        print(_NO_MEMORY.format(tokens=options.max_batch_prefill_tokens), file=sys.stderr)
        leave(1)
    if knobs.gpu_weights_mib:
        from tgi_memory import take_cache

        blocks = take_cache(options, knobs)
        say("text_generation_launcher", f"KV-cache blocks: {blocks}, size: 1")
    say(at, f"Setting max batch total tokens to {options.max_batch_total_tokens}")
    say(at, "Using backend V3")
    from tgi_http import serve

    serve(options, knobs, shards)


def _bind_once(port: int) -> None:
    """The metrics' own port is bound at the start, and released; the metrics are on the main port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("0.0.0.0", port))
            listener.listen(1)
        except OSError:
            print("thread 'main' panicked: failed to build prometheus recorder: FailedToCreateHTTPListener", file=sys.stderr)
            leave(101)


if __name__ == "__main__":
    main(sys.argv[1:])
