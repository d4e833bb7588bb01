"""Compares the data plane with other proxies before one fast engine, in one run; prints a table and the ratios.

CPU time comes from /proc, so that what else the machine does matters less than it would to a clock on the wall.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench import subjects
from bench.subjects import CHAT, HOST, Subject

HERE = Path(__file__).parent
GAP_US = 10_000
START_S = 240.0
MANY = 1000
"""Above so many streams each subject is started anew, offloadd with more engines."""


@dataclass
class Result:
    """What was measured of one subject. None: not measured."""

    name: str
    version: str = ""
    json_rate: float | None = None
    json_cpu_us: float | None = None
    chunk_cpu_us: float | None = None
    first_us: dict[str, int] = field(default_factory=dict)
    delay_us: dict[str, int] = field(default_factory=dict)
    per_stream: dict[int, float] = field(default_factory=dict)
    """KiB of its memory for each of so many open streams."""
    failed: int = 0


@dataclass
class Tools:
    """The compiled engine and client."""

    engine: Path
    load: Path

    def run(self, mode: str, port: int, connections: int, seconds: float, *more: object) -> dict[str, Any]:
        """One run of the client."""
        argv = [str(self.load), mode, str(port), CHAT, str(connections), str(seconds), *map(str, more)]
        return dict(json.loads(subprocess.run(argv, capture_output=True, check=True, text=True).stdout))


def main() -> None:
    """Measure whoever is there."""
    options = _options()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for all that is started here: a stream takes two files
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        tools = Tools(_compiled(folder, "engine"), _compiled(folder, "load"))
        results = [result for only in options.only.split(",") if (result := _measured(only, folder, tools, options)) is not None]
    print(table(results, options))
    if options.json:
        Path(options.json).write_text(json.dumps([vars(result) for result in results], indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="length of one measurement")
    parser.add_argument("--only", default="direct,offloadd,nginx,Caddy,LiteLLM,llama-swap", help="whom to measure")
    parser.add_argument("--open", default="100,1000,5000", help="numbers of open streams for the memory of each")
    parser.add_argument("--caddy-procs", type=int, default=1, help="GOMAXPROCS of Caddy; 0 leaves it to Caddy")
    parser.add_argument("--litellm", help="its program, where it is not beside our own Python")
    parser.add_argument("--llama-swap", help="its program")
    parser.add_argument("--json", help="write the figures here as well")
    return parser.parse_args()


def _compiled(folder: Path, name: str) -> Path:
    program = folder / name
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


def _measured(name: str, parent: Path, tools: Tools, options: argparse.Namespace) -> Result | None:
    counts = [int(count) for count in options.open.split(",") if count]
    few = [count for count in counts if count <= MANY]
    many = [count for count in counts if count > MANY]
    result = _with(
        name, parent / name, tools, options, lambda subject, processes: _measure(subject, processes, tools, options, few)
    )
    if result is not None and many and name != "direct":

        def hold(subject: Subject, processes: Processes) -> Result:
            for count in many:
                _hold(result, subject, processes, tools, count)
            return result

        _with(name, parent / f"{name}-many", tools, options, hold, replicas=5)
    return result


def _with(
    name: str,
    folder: Path,
    tools: Tools,
    options: argparse.Namespace,
    measure: Callable[[Subject, Processes], Result],
    replicas: int = 1,
) -> Result | None:
    """What `measure` finds of a subject that runs."""
    folder.mkdir()
    engine_port, port = _free_port(), _free_port()
    subject = {
        "direct": lambda: Subject("direct", port=engine_port),
        "offloadd": lambda: subjects.offloadd(folder, port, GAP_US, tools.engine, replicas),
        "nginx": lambda: subjects.nginx(folder, port, engine_port),
        "Caddy": lambda: subjects.caddy(folder, port, engine_port, options.caddy_procs),
        "LiteLLM": lambda: subjects.litellm(folder, port, engine_port, options.litellm),
        "llama-swap": lambda: subjects.llama_swap(folder, port, GAP_US, tools.engine, options.llama_swap),
    }[name]()
    if subject.missing:
        print(f"{name} is left out: {subject.missing}", file=sys.stderr)
        return None
    with contextlib.ExitStack() as stack:
        if not subject.own_engine:
            stack.enter_context(_running([str(tools.engine), "--port", str(engine_port), "--gap-us", str(GAP_US)], {}, folder))
            _wait(engine_port, "/health")
        processes = Processes(None, tools.engine)
        if subject.argv:
            processes = Processes(stack.enter_context(_running(list(subject.argv), subject.env, folder)), tools.engine)
            _wait(subject.port, subject.warm)
        _wait_for_answer(subject.port)
        print(f"measuring {name}", file=sys.stderr)
        return measure(subject, processes)


class Processes:
    """A subject's processes, the engine aside, and what they have used."""

    def __init__(self, process: subprocess.Popen[bytes] | None, engine: Path) -> None:
        self._root = None if process is None else psutil.Process(process.pid)
        self._engine = str(engine)

    def _all(self) -> list[psutil.Process]:
        if self._root is None:
            return []
        return [one for one in [self._root, *self._root.children(recursive=True)] if one.cmdline()[:1] != [self._engine]]

    def cpu_s(self) -> float:
        """CPU time so far."""
        return sum(sum(one.cpu_times()[:2]) for one in self._all())

    def memory(self) -> int:
        """Bytes that are theirs."""
        return sum(one.memory_full_info().pss for one in self._all())


def _measure(subject: Subject, processes: Processes, tools: Tools, options: argparse.Namespace, counts: Sequence[int]) -> Result:
    result = Result(subject.name, subject.version)
    tools.run("json", subject.port, 64, 1)
    tools.run("stream", subject.port, 100, 1, 20)
    before = processes.cpu_s()
    found = tools.run("json", subject.port, 64, options.seconds)
    result.json_rate = found["rate"]
    result.json_cpu_us = (processes.cpu_s() - before) / max(1, found["answers"]) * 1e6
    result.failed += found["failed"]
    # Streams one of which begins every 10 ms: first tokens are then those of single requests.
    found = tools.run("stream", subject.port, 100, options.seconds + 1, 100)
    result.first_us, result.delay_us = found["first_us"], found["delay_us"]
    result.failed += found["failed"]
    result.chunk_cpu_us = _per_chunk(subject, processes, tools, options.seconds)
    if subject.argv:
        for count in counts:
            _hold(result, subject, processes, tools, count)
    return result


def _per_chunk(subject: Subject, processes: Processes, tools: Tools, seconds: float) -> float | None:
    """CPU time for each chunk of 100 streams that are under way, 100 chunks a second each; None when no chunk came in time."""
    argv = [str(tools.load), "hold", str(subject.port), CHAT, "100", str(seconds), "1000000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        client.stderr.readline()
        before, began = processes.cpu_s(), time.monotonic()
        time.sleep(seconds * 0.8)
        used, took = processes.cpu_s() - before, time.monotonic() - began
        found = json.loads(client.stdout.read())
    return used / (found["rate"] * took) * 1e6 if found["rate"] else None


def _hold(result: Result, subject: Subject, processes: Processes, tools: Tools, count: int) -> None:
    """How many KiB each of `count` streams takes while it is open and gets a chunk a second; no figure if they cannot be opened."""
    time.sleep(1)
    before = processes.memory()
    argv = [str(tools.load), "hold", str(subject.port), CHAT, str(count), "4", "1000000", "1000000"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as client:
        assert client.stderr is not None
        if client.stderr.readline() == b"open\n":
            time.sleep(2)
            result.per_stream[count] = (processes.memory() - before) / count / 1024
        else:
            print(f"{subject.name} did not open {count} streams", file=sys.stderr)
        client.kill()
    time.sleep(1)


@contextlib.contextmanager
def _running(argv: list[str], env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "output.log").open("ab") as log:
        process = subprocess.Popen(argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(port: int, method: str, path: str, body: str | None = None) -> int:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _wait(port: int, path: str) -> None:
    deadline = time.monotonic() + START_S
    while _ask(port, "GET", path) == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens on port {port}")
        time.sleep(0.05)


def _wait_for_answer(port: int) -> None:
    deadline = time.monotonic() + START_S
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
    while (status := _ask(port, "POST", CHAT, body)) != 200:
        if time.monotonic() > deadline:
            raise TimeoutError(f"port {port} answers {status}")
        time.sleep(0.1)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def table(results: list[Result], options: argparse.Namespace) -> str:
    """The figures as a table in Markdown, and what they are in relation to ours."""
    opened = [int(count) for count in options.open.split(",") if count]
    head = ["", "JSON/s", "CPU µs/request", "CPU µs/chunk", "first token p50/p99 ms", "between tokens p50/p99 ms"]
    head += [f"KiB/stream at {count:,}" for count in opened]
    rows = [[_title(result), *_cells(result, opened)] for result in results]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([f"{_machine()}, {options.seconds:g} s per measurement", "", *lines, "", *_ratios(results)])


def _title(result: Result) -> str:
    return f"{result.name} {result.version}".strip()


def _cells(result: Result, opened: list[int]) -> list[str]:
    cells = [f"{result.json_rate:,.0f}" if result.json_rate else "–"]
    cells += [f"{figure:.1f}" if figure else "–" for figure in (result.json_cpu_us, result.chunk_cpu_us)]
    cells += [f"{spread['p50'] / 1000:.2f} / {spread['p99'] / 1000:.2f}" for spread in (result.first_us, result.delay_us)]
    return [*cells, *(f"{result.per_stream[count]:.1f}" if count in result.per_stream else "–" for count in opened)]


def _ratios(results: list[Result]) -> list[str]:
    by_name = {result.name: result for result in results}
    ours = by_name.get("offloadd")
    if ours is None:
        return []
    lines = []
    for name, other in by_name.items():
        if name in ("offloadd", "direct"):
            continue
        parts = [
            f"{what} {mine / theirs:.2f} ×"
            for what, mine, theirs in (
                ("JSON rate", ours.json_rate, other.json_rate),
                ("CPU per request", ours.json_cpu_us, other.json_cpu_us),
                ("CPU per chunk", ours.chunk_cpu_us, other.chunk_cpu_us),
            )
            if mine and theirs
        ]
        lines.append(f"- offloadd to {name}: {', '.join(parts)}")
    if direct := by_name.get("direct"):
        added = [(ours.first_us[part] - direct.first_us[part]) / 1000 for part in ("p50", "p99")]
        lines.append(
            f"- offloadd adds to the first token: {added[0]:.2f} ms at the median, {added[1]:.2f} ms at the 99th percentile"
        )
    return lines


def _machine() -> str:
    return f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
