"""Who uses the daemon in a soak: clients of every dialect, some slow, some who leave; vandals; and an operator who looks on."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import threading
from collections import deque
from typing import Any

from tests.conformance.servers import HOST
from tests.integration.daemon import CHAT, Daemon
from tests.soak.ledger import Ledger, Seen

MODELS = ("a", "b", "c", "twice")
HUNG = 20
"""Connections that say nothing more, of one vandal at once."""
_LARGE = 100_000
"""Characters of a prompt that is more than a small body."""
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')
"""In an answer or an event of any dialect; where all is well, some say `"error":null`."""
_LOOKS = (
    "/metrics", "/models", "/models/a", "/explain", "/explain/b", "/vram/status", "/health", "/config", "/backends", "/v1/models",
    "/logs/a", "/nothing",
)  # fmt: skip
_LEFT_OPEN = (("GET", "/events", None), ("GET", "/logs/a?follow=1", None), ("POST", "/borrow", {"size": "1MiB", "device": "host"}))
"""Answers without an end, which whoever follows them just leaves."""


def asked(text: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """A request of each dialect, plain and streaming."""
    say = [{"role": "user", "content": text}]
    return (
        (CHAT, {"messages": say, "max_tokens": 20}),
        (CHAT, {"messages": say, "max_tokens": 60, "stream": True}),
        ("/v1/completions", {"prompt": text, "max_tokens": 10}),
        ("/v1/completions", {"prompt": text + " long" * (_LARGE // 5), "max_tokens": 10}),
        ("/inference", {"prompt": text, "max_tokens": 10}),
        ("/inference", {"messages": say, "max_tokens": 30, "stream": True}),
        ("/v1/messages", {"messages": say, "max_tokens": 20}),
        ("/v1/messages", {"messages": say, "max_tokens": 40, "stream": True}),
        ("/v1/responses", {"input": text, "max_output_tokens": 20, "store": False}),
        ("/api/chat", {"messages": say, "options": {"num_predict": 30}}),
        ("/api/generate", {"prompt": text, "stream": False, "options": {"num_predict": 10}}),
        ("/v1/embeddings", {"input": text}),
    )


class Clients:
    """What each of them does until `over`."""

    def __init__(self, daemon: Daemon, ledger: Ledger, over: threading.Event) -> None:
        self._daemon, self._ledger, self._over = daemon, ledger, over

    def warm_up(self) -> None:
        """Every path once, so that what is made at the first use is not taken for a leak."""
        for name in MODELS:  # one after another, since some of them leave soon
            for path, body in asked("hello"):
                self._ask(path, {**body, "model": name}, random.Random(0), leave=False)
        for path in _LOOKS:
            self._daemon.request("GET", path)

    def ask(self, rng: random.Random) -> None:
        """One good client, who is slow now and then, or leaves, or asks for what there is not."""
        while not self._over.is_set():
            # Most say what nobody has said before. The others say what may have been on engines that were killed.
            path, body = rng.choice(asked(f"hello {rng.random()}" if rng.random() < 0.9 else "hello"))
            name = rng.choice((*MODELS, "nobody") if rng.random() < 0.1 else MODELS)
            self._ask(path, {**body, "model": name}, rng, leave=rng.random() < 0.2)

    def vandalize(self, rng: random.Random) -> None:
        """What is no request: none of it is counted, and none of it may stay."""
        junk = (
            *(b"GET / HT", b"\x16\x03\x01\x02", b"POST /inference HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n", b""),
            b"POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        )
        hung: deque[socket.socket] = deque()
        while not self._over.wait(rng.random() * 0.2):
            with contextlib.suppress(OSError):
                hung.append(socket.create_connection((HOST, self._daemon.port), timeout=10))
                hung[-1].sendall(rng.choice(junk))
            if len(hung) > HUNG:
                hung.popleft().close()
        for each in hung:
            each.close()

    def look_on(self, rng: random.Random) -> None:
        """Control plane: what a dashboard and a curious person ask for, followed for a moment where there is no end to it."""
        while not self._over.wait(rng.random() * 0.3):
            if rng.random() < 0.7:
                self._daemon.request("GET", rng.choice(_LOOKS))
                continue
            method, path, body = rng.choice(_LEFT_OPEN)
            with contextlib.closing(self._daemon.connect()) as connection:
                connection.request(method, path, None if body is None else json.dumps(body))
                connection.getresponse().read1(100)
                self._over.wait(rng.random())

    def _ask(self, path: str, body: dict[str, Any], rng: random.Random, *, leave: bool) -> None:
        """One whole request; `leave` walks away after the first bytes of its answer."""
        name = self._ledger.open()
        headers = {"Content-Type": "application/json", "X-Request-Id": name}
        with contextlib.closing(http.client.HTTPConnection(HOST, self._daemon.port, timeout=90)) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            seen = self._read(connection.getresponse(), rng, leave=leave)
        self._ledger.close(name, seen)

    def _read(self, response: http.client.HTTPResponse, rng: random.Random, *, leave: bool) -> Seen:
        slow = rng.random() < 0.1
        whole = b""
        try:
            while piece := response.read1(64 if slow else 65536):
                whole += piece
                if leave:
                    return Seen(response.status, left=True)
                if slow:
                    self._over.wait(0.002)
        except (http.client.IncompleteRead, ConnectionError):
            return Seen(response.status, cut=True)
        return Seen(response.status, error=response.status < 400 and _ERROR.search(whole) is not None)
