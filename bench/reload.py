"""A config of 1,000 models, edited in one line and reloaded while requests run: `python bench/reload.py [MODELS] [RELOADS]`."""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.daemon import Daemon, launch, model, supervised


def config(models: int, priority: int) -> dict[str, Any]:
    """Two models that run, and many that nobody asks for; `priority` is of the first of those."""
    many = {f"model-{number:04}": model(run="on-demand") for number in range(models - 2)}
    many["model-0000"]["priority"] = priority
    return {"steady": model(parallel=4), "other": model(), **many}


def stream(daemon: Daemon, stop: threading.Event, statuses: Counter[int]) -> None:
    """Ask without a pause."""
    while not stop.is_set():
        statuses[daemon.chat("steady", 4).status] += 1


def main(models: int = 1000, reloads: int = 100) -> None:
    """Print how long reloads took, and what became of requests and of processes meanwhile."""
    with tempfile.TemporaryDirectory() as folder, supervised(launch(Path(folder), config(models, 50))) as daemon:
        pids = {name: daemon.pid(name) for name in ("steady", "other")}
        stop, statuses = threading.Event(), Counter[int]()
        clients = [threading.Thread(target=stream, args=(daemon, stop, statuses)) for _ in range(2)]
        for client in clients:
            client.start()
        spans = []
        for number in range(reloads):
            daemon.write(config(models, 10 + number % 80))
            begun = time.perf_counter()
            assert daemon.post("/reload", None).status == 200
            spans.append(time.perf_counter() - begun)
        stop.set()
        for client in clients:
            client.join()
        same = pids == {name: daemon.pid(name) for name in pids}
        spread = f"{statistics.median(spans) * 1000:.0f} ms in the middle, {max(spans) * 1000:.0f} ms at most"
        print(f"{models} models, {reloads} reloads of one edited line: {spread}")
        print(f"requests meanwhile by status: {dict(statuses)}; same processes: {same}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
