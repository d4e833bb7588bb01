"""How long nobody is served after a `kill -9` of the daemon: `python bench/restart.py [TIMES]`, with the real llama-server.

Two models are ready and a stream runs on each. The daemon is killed and begun anew; both models are asked until they answer.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from offloadd import demo
from tests.integration.daemon import Daemon, again, launch, model, supervised, wait_healthy

MODELS = ("a", "b")


def main(times: int = 10) -> None:
    """Print each restart, and the median and the longest of all."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # no service reads its modules anew as text each time
    server, env = demo.find_server()
    spec = model(source=str(demo.find_model()), context=2048, vram="auto")
    walls: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        daemon = launch(Path(folder), dict.fromkeys(MODELS, spec), llamacpp={"command": [str(server)], "env": env})
        try:
            wait_healthy(daemon)
            pids = {name: daemon.pid(name) for name in MODELS}
            for number in range(times):
                kill_under_streams(daemon)
                daemon = again(daemon.folder, daemon.config_path, daemon.base)
                spans, worked = until_served(daemon)
                walls.append(max(spans.values()))
                assert {name: daemon.pid(name) for name in MODELS} == pids
                assert [daemon.launches(name) for name in MODELS] == [1, 1]
                said = ", ".join(f"{name} after {span:.2f} s" for name, span in spans.items())
                print(f"{number + 1}: {said}; {worked:.2f} s of processor time; the same processes, nothing loaded", flush=True)
            print(f"both: median {statistics.median(walls):.2f} s, longest {max(walls):.2f} s, of {times}")
            with supervised(daemon):
                pass
        finally:
            daemon.discard()


def kill_under_streams(daemon: Daemon) -> None:
    with daemon.stream("a", 400, ignore_eos=True) as one, daemon.stream("b", 400, ignore_eos=True) as other:
        one.skip(3)
        other.skip(3)
        daemon.signal(signal.SIGKILL)
        daemon.exit()


def until_served(daemon: Daemon) -> tuple[dict[str, float], float]:
    """Seconds from the daemon's start to the end of each model's first answer, and its processor seconds up to there."""
    begun = time.monotonic()

    def answered(name: str) -> float:
        while True:
            with suppress(OSError):
                reply = daemon.chat(name, 1)
                assert (reply.status, reply.headers["X-Offloadd-Instance"]) == (200, f"{name}-1"), reply
                return time.monotonic() - begun
            time.sleep(0.005)

    with ThreadPoolExecutor(len(MODELS)) as threads:
        spans = dict(zip(MODELS, threads.map(answered, MODELS), strict=True))
    tasks = Path(f"/proc/{daemon.process.pid}/task").iterdir()
    return spans, sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]))
