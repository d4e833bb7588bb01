"""What an idle daemon costs: `python bench/idle.py [MODELS] [SECONDS] [RUNS]`. A real daemon, and nobody asks for anything."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.daemon import launch, model, supervised


def main(models: int = 100, seconds: float = 60.0, runs: int = 1) -> None:
    """Print the share of a core and the memory, before and after, so many times."""
    with tempfile.TemporaryDirectory() as folder:
        specs = {f"model-{number:04}": model(run="on-demand") for number in range(models)}
        with supervised(launch(Path(folder), specs)) as daemon:
            time.sleep(10)
            process = psutil.Process(daemon.process.pid)
            for _ in range(runs):
                held, before, begun = process.memory_info().rss, on_core(process.pid), time.monotonic()
                time.sleep(seconds)
                after, span = on_core(process.pid), time.monotonic() - begun
                share = sum(spent - before.get(thread, 0) for thread, spent in after.items()) / 1e9 / span
                grown = (process.memory_info().rss - held) / 1024
                load = os.getloadavg()[0]
                said = f"{share:.3%} of a core, memory {held / 2**20:.1f} MiB {grown:+.0f} KiB (load of the machine {load:.1f})"
                print(f"{models} models, idle for {span:.0f} s: {said}", flush=True)


def on_core(pid: int) -> dict[str, int]:
    """Nanoseconds that each thread was on a core, as the scheduler counts them: ticks are too coarse for what takes so little."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()}


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
