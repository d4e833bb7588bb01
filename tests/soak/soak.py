"""A house full of clients, good ones and bad ones, on a daemon whose engines are killed and whose config changes all the while.

At its end everything is counted: every request has ended in one way, and nothing that was taken is still held.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.servers import HOST, until
from tests.integration.daemon import CHAT, Daemon, model, running

MODELS = ("a", "b", "c", "twice")
CLIENTS = 10
_SAY = [{"role": "user", "content": "hello"}]
_ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"messages": _SAY, "max_tokens": 20}),
    (CHAT, {"messages": _SAY, "max_tokens": 60, "stream": True}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 10}),
    ("/inference", {"prompt": "hello", "max_tokens": 10}),
    ("/inference", {"messages": _SAY, "max_tokens": 30, "stream": True}),
    ("/v1/messages", {"messages": _SAY, "max_tokens": 20}),
    ("/v1/messages", {"messages": _SAY, "max_tokens": 40, "stream": True}),
    ("/api/chat", {"messages": _SAY, "options": {"num_predict": 30}}),
    ("/api/generate", {"prompt": "hello", "stream": False, "options": {"num_predict": 10}}),
    ("/v1/embeddings", {"input": "hello"}),
)
"""A request of each dialect, plain and streaming."""


@dataclass(slots=True)
class Figures:
    """What was done, and what the daemon held before and after."""

    sent: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    reloads: int = 0
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    """Requests by fate, as the daemon's metrics have them."""

    def lines(self) -> Iterator[str]:
        """As a person reads them."""
        yield f"sent {self.sent} requests; clients saw {dict(sorted(self.ends.items()))}"
        yield f"the daemon counted {dict(sorted(self.counted.items()))}, {sum(self.counted.values())} in all"
        yield f"{self.kills} engines killed, {self.reloads} reloads"
        yield f"held before {self.before}"
        yield f"held after  {self.after}"


def models(generation: int) -> dict[str, Any]:
    """The config; each generation renames an alias, which touches no server, and now and then it replaces one."""
    quick = {"restart": {"backoff": "20ms", "max_backoff": "100ms", "give_up_after": 1000}, "queue": {"max_wait": "20s"}}
    return {
        "a": model(aliases=[f"alias-{generation}"], parallel=4, **quick),
        "b": model(run="on-demand", idle_timeout="1s", llamacpp={"embeddings": True}, **quick),
        "c": model(run="on-demand", idle_timeout="500ms", context=8192 + 256 * (generation // 5 % 2), **quick),
        "twice": model(replicas=2, **quick),
    }


def soak(folder: Path, seconds: float, seed: int) -> Figures:
    """Run it; AssertionError says what does not add up."""
    figures = Figures()
    with running(folder, models(0)) as daemon:
        for name in ("a", "twice"):
            daemon.wait_for(name)
        house = _House(daemon, figures, seed)
        house.warm_up()
        figures.before = _held(daemon)
        house.run(seconds)
        _settle(daemon, figures)
        figures.after = _held(daemon)
        figures.counted = _counted(daemon)
    return figures


def check(figures: Figures) -> None:
    """What must add up."""
    assert sum(figures.counted.values()) == figures.sent, list(figures.lines())
    assert figures.after["fds"] <= figures.before["fds"] + 8, list(figures.lines())
    assert figures.after["threads"] <= figures.before["threads"] + 8, list(figures.lines())
    assert figures.after["rss"] <= figures.before["rss"] * 1.5 + 32 * 2**20, list(figures.lines())
    assert figures.ends["broken"] == 0, list(figures.lines())


class _House:
    def __init__(self, daemon: Daemon, figures: Figures, seed: int) -> None:
        self._daemon, self._figures = daemon, figures
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Every path once, so that what is made at the first use is not taken for a leak."""
        for path, body in _ASKED:
            for name in MODELS:
                self._ask(path, {**body, "model": name}, random.Random(0), leave=False)

    def run(self, seconds: float) -> None:
        """Clients and trouble at once, until the time is over and every client has had its answer."""
        with ThreadPoolExecutor(max_workers=CLIENTS + 2) as pool:
            work: list[Callable[[random.Random], None]] = [*[self._client] * CLIENTS, self._vandal, self._trouble]
            running_now = [pool.submit(each, random.Random(self._rng.random())) for each in work]
            self._over.wait(seconds)
            self._over.set()
            for each in running_now:
                each.result(120)

    def _client(self, rng: random.Random) -> None:
        while not self._over.is_set():
            path, body = rng.choice(_ASKED)
            name = rng.choice((*MODELS, "nobody") if rng.random() < 0.1 else MODELS)
            self._ask(path, {**body, "model": name}, rng, leave=rng.random() < 0.2)

    def _ask(self, path: str, body: dict[str, Any], rng: random.Random, *, leave: bool) -> None:
        """One whole request; `leave` walks away after the first bytes of its answer."""
        with self._lock:
            self._figures.sent += 1
        with contextlib.closing(http.client.HTTPConnection(HOST, self._daemon.port, timeout=90)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            end = self._read(connection.getresponse(), rng, leave=leave)
        with self._lock:
            self._figures.ends[end] += 1

    def _read(self, response: http.client.HTTPResponse, rng: random.Random, *, leave: bool) -> str:
        slow = rng.random() < 0.1
        whole = b""
        try:
            while piece := response.read1(64 if slow else 65536):
                whole += piece
                if leave:
                    return "left"
                if slow:
                    self._over.wait(0.002)
        except (http.client.IncompleteRead, ConnectionError):
            return "broken"  # a stream that breaks off must say so, and not just end
        return str(response.status)

    def _vandal(self, rng: random.Random) -> None:
        """What is no request: none of it is counted, and none of it may stay."""
        junk = (b"GET / HT", b"\x16\x03\x01\x02", b"POST /inference HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n", b"")
        while not self._over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((HOST, self._daemon.port), timeout=10) as sock:
                sock.sendall(rng.choice(junk))
                self._over.wait(rng.random() * 0.2)

    def _trouble(self, rng: random.Random) -> None:
        """Engines are killed and the config changes, by every way of asking for it."""
        while not self._over.wait(0.2 + rng.random()):
            if rng.random() < 0.5:
                self._kill(rng)
            else:
                self._figures.reloads += 1
                self._daemon.write(models(self._figures.reloads))
                rng.choice((self._daemon.hup, lambda: self._daemon.post("/reload", None)))()

    def _kill(self, rng: random.Random) -> None:
        pids = self._daemon.pids(rng.choice(MODELS))
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
                self._figures.kills += 1


def _settle(daemon: Daemon, figures: Figures) -> None:
    """Until nothing runs or waits, the idle have left, and every replica is back."""

    def quiet() -> bool:
        shown = {entry["id"]: entry["offloadd"] for entry in daemon.get("/models")["data"]}
        busy = any(own["waiting"] or any(each["load"] for each in own["instances"]) for own in shown.values())
        states = {name: [each["state"] for each in own["instances"]] for name, own in shown.items()}
        return not busy and states == {"a": ["ready"], "b": [], "c": [], "twice": ["ready", "ready"]}

    until(quiet, "nothing runs or waits any more", 60)
    until(lambda: sum(_counted(daemon).values()) >= figures.sent, f"all {figures.sent} requests are counted", 30)


def _held(daemon: Daemon) -> dict[str, int]:
    process = psutil.Process(daemon.process.pid)
    (host,) = (each for each in daemon.get("/vram/status")["devices"] if each["kind"] == "host")
    return {
        "fds": process.num_fds(),
        "threads": process.num_threads(),
        "rss": process.memory_info().rss,
        "engines": len(daemon.leftovers()),
        "reserved": host["reserved_bytes"],
    }


def _counted(daemon: Daemon) -> dict[str, int]:
    text = daemon.request("GET", "/metrics").body.decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "offloadd_requests_total":
                found[sample.labels["fate"]] += int(sample.value)
    return dict(found)
