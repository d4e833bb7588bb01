"""What an idle daemon costs: `python bench/idle.py [MODELS] [SECONDS]`. A real daemon, and nobody asks for anything."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.daemon import launch, model, supervised


def main(models: int = 100, seconds: float = 60.0) -> None:
    """Print the share of a core and the memory, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        specs = {f"model-{number:04}": model(run="on-demand") for number in range(models)}
        with supervised(launch(Path(folder), specs)) as daemon:
            time.sleep(10)
            process = psutil.Process(daemon.process.pid)
            before, held = process.cpu_times(), process.memory_info().rss
            begun = time.monotonic()
            time.sleep(seconds)
            after, span = process.cpu_times(), time.monotonic() - begun
            used = after.user + after.system - before.user - before.system
            grown = (process.memory_info().rss - held) / 1024
            share = used / span
            print(f"{models} models, idle for {span:.0f} s: {share:.3%} of a core, memory {held / 2**20:.1f} MiB {grown:+.0f} KiB")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
