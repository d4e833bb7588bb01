"""A house full of clients, good ones and bad ones, on a daemon whose engines are killed and whose config changes all the while.

At its end everything is counted: every request has ended in one way, and nothing that was taken is still held.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conformance.servers import until
from tests.integration.daemon import Daemon, model, running
from tests.soak import held, memory
from tests.soak.clients import MODELS, Clients
from tests.soak.held import Held
from tests.soak.ledger import Ledger

CLIENTS = 10
CLIENT_S = 120.0
"""How long a client may take to see the end of its last request."""


@dataclass(slots=True)
class Figures:
    """What was done, and what the daemon held before and after."""

    sent: int = 0
    ends: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests, by what the client saw and the daemon's word for it."""
    fates: dict[str, int] = field(default_factory=dict)
    """The same by the daemon's word alone."""
    counted: dict[str, int] = field(default_factory=dict)
    """Requests by fate, as the daemon's metrics have them."""
    kills: int = 0
    reloads: int = 0
    before: Held = field(default_factory=dict)
    after: Held = field(default_factory=dict)
    memory: list[memory.Sample] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """As a person reads them."""
        sums = " + ".join(f"{count} {fate}" for fate, count in sorted(self.counted.items()))
        yield f"sent {self.sent} = {sums}"
        yield "as clients saw it: " + "; ".join(f"{count} {fate} ({seen})" for (seen, fate), count in sorted(self.ends.items()))
        yield f"{self.kills} engines killed, {self.reloads} reloads"
        for name, now in (("before", self.before), ("after", self.after)):
            yield f"held {name}: " + ", ".join(f"{what} {count}" for what, count in sorted(now.items()) if count)
        yield from memory.told(self.memory)


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
        ledger = Ledger(daemon)
        house = _House(daemon, ledger, figures, seed)
        house.warm_up()
        _settle(daemon)
        figures.before = held.least(daemon)
        with memory.Watch(daemon.process.pid, lambda: ledger.sent) as watch:
            house.run(seconds)
            _settle(daemon)
        figures.sent, figures.ends, figures.fates, figures.memory = ledger.sent, dict(ledger.ends), ledger.fates, watch.samples
        figures.after = held.nothing_left(daemon, figures.before)
        found = held.scraped(daemon)
        figures.counted = {what.removeprefix("fate "): found[what] for what in found if what.startswith("fate ")}
    return figures


def check(figures: Figures) -> None:
    """What must add up. That each request ended as its client saw, and that nothing is held, was checked on the way."""
    told = list(figures.lines())
    assert sum(figures.counted.values()) == sum(figures.fates.values()) == figures.sent, told
    assert figures.counted == figures.fates, told
    for what in ("bytes promised", "instances", "children", "processes that bear its mark"):
        assert figures.after[what] == figures.before[what], told
    first, last = figures.memory[0], figures.memory[-1]
    assert last.resident <= first.resident * 1.5 + 32 * memory.MIB, told
    if last.at >= memory.LONG_S:
        assert (memory.slope(figures.memory) or 0) <= memory.MOST, told


class _House:
    def __init__(self, daemon: Daemon, ledger: Ledger, figures: Figures, seed: int) -> None:
        self._daemon, self._ledger, self._figures = daemon, ledger, figures
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._clients = Clients(daemon, ledger, self._over)

    def warm_up(self) -> None:
        """What is made at the first use is there afterwards: every path, and every thread that blocking work may have."""
        self._clients.warm_up()
        for soon in [self._daemon.threads.submit(self._daemon.get, "/models/a") for _ in range(32)]:
            soon.result(30)

    def run(self, seconds: float) -> None:
        """Clients and trouble at once, until the time is over and every client has had its answer."""
        who = self._clients
        work: list[Callable[[random.Random], None]] = [*[who.ask] * CLIENTS, who.vandalize, who.look_on, self._trouble]
        with ThreadPoolExecutor(max_workers=len(work)) as pool:
            running_now = [pool.submit(each, random.Random(self._rng.random())) for each in work]
            wait(running_now, seconds, FIRST_EXCEPTION)
            self._over.set()
            for each in running_now:
                each.result(CLIENT_S)

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
        alive = [each for each in self._daemon.look(rng.choice(MODELS))["instances"] if each["pid"]]
        if alive:
            victim = rng.choice(alive)
            self._ledger.killed.add(victim["instance"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim["pid"], signal.SIGKILL)
                self._figures.kills += 1


def _settle(daemon: Daemon) -> None:
    """Until nothing runs or waits, the idle have left, and every replica is back."""

    def quiet() -> bool:
        shown = {entry["id"]: entry["offloadd"] for entry in daemon.get("/models")["data"]}
        busy = any(own["waiting"] or any(each["load"] for each in own["instances"]) for own in shown.values())
        states = {name: [each["state"] for each in own["instances"]] for name, own in shown.items()}
        return not busy and states == {"a": ["ready"], "b": [], "c": [], "twice": ["ready", "ready"]}

    until(quiet, "nothing runs or waits any more", 60)
