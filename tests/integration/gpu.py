"""A real daemon on cards that are not there: the fake libnvidia-ml.so.1, and models whose stand-in server holds memory on it."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conformance.servers import STANDIN, until
from tests.fakes.nvml import fake
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, Settings, again, launch, model, supervised

MIB = 2**20
GIB = 2**30
LIMIT = int(24 * GIB * 0.95) - 512 * MIB
"""Of a card of 24 GiB, with the budget that a config without one has."""


def gpu_model(gib: float, *, takes: float | None = None, load_s: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A model that is promised `gib` on a GPU, and takes as much unless `takes` says otherwise."""
    size = int(gib * 1024)
    knobs = {
        "STANDIN_GPU_MIB": size if takes is None else int(takes * 1024),
        "STANDIN_LOAD_S": load_s,
        **changes.pop("env", {}),
    }
    return model(**{"run": "on-demand", "vram": f"{size}MiB", "context": 2048, **changes, "env": knobs})


def cards(folder: Path, count: int = 2) -> FakeNvml:
    """The cards, or a skipped test where there is no C compiler."""
    if not fake.compiler():
        pytest.skip("no C compiler for the fake libnvidia-ml.so.1")
    return FakeNvml(folder, count)


def engine(nvml: FakeNvml) -> dict[str, Any]:
    """The stand-in, which is told where it registers what it holds."""
    return {"command": [sys.executable, str(STANDIN)], "env": {"FAKE_NVML_PROCS": str(nvml.procs)}}


def environment(nvml: FakeNvml) -> dict[str, str]:
    """What makes a daemon see the cards."""
    return {**nvml.environment, "LD_LIBRARY_PATH": str(fake.build().parent)}


def launch_on(nvml: FakeNvml, folder: Path, models: Mapping[str, Settings], **options: Any) -> Daemon:
    """Start a daemon that sees the cards; options as `launch` takes them. It looks more often than others, to save time."""
    options.setdefault("patches", {"offloadd.rounds.REFRESH": 0.2})
    return launch(folder, models, llamacpp=engine(nvml), env=environment(nvml), **options)


def running_on(
    nvml: FakeNvml, folder: Path, models: Mapping[str, Settings], **options: Any
) -> contextlib.AbstractContextManager[Daemon]:
    """The same, from start to a checked end."""
    return supervised(launch_on(nvml, folder, models, **options))


def restart_on(nvml: FakeNvml, daemon: Daemon, **options: Any) -> contextlib.AbstractContextManager[Daemon]:
    """A daemon for the config and the data folder of one that has ended."""
    return supervised(again(daemon.folder, daemon.config_path, daemon.base, env=environment(nvml), **options))


def card(daemon: Daemon, index: int = 0) -> Any:
    """What /vram/status says about one card."""
    return next(each for each in daemon.get("/vram/status")["devices"] if each["kind"] == "nvidia" and each["index"] == index)


def wait_card(daemon: Daemon, index: int, within_s: float = 15, **wanted: Any) -> Any:
    """What /vram/status says about one card once it says this."""

    def found() -> Any:
        seen = card(daemon, index)
        return seen if all(seen[key] == value for key, value in wanted.items()) else None

    return until(found, f"card {index} shows {wanted}", within_s)


def places(daemon: Daemon, name: str) -> dict[str, int]:
    """Where the model's instances have memory reserved: bytes by the id of the device."""
    devices = daemon.get("/vram/status")["devices"]
    return {
        each["id"]: sum(held["reserved_bytes"] for held in each["instances"] if held["model"] == name)
        for each in devices
        if any(held["model"] == name for held in each["instances"])
    }


def gpus_of(daemon: Daemon, nvml: FakeNvml, name: str) -> list[int]:
    """Indexes of the cards on which the model has memory reserved."""
    held = places(daemon, name)
    return [index for index, gpu in enumerate(nvml.gpus) if gpu.uuid in held]


def environ(pid: int) -> dict[str, str]:
    """The environment of a process."""
    return psutil.Process(pid).environ()


def argv(pid: int) -> list[str]:
    """The command line of a process."""
    return psutil.Process(pid).cmdline()


def option(pid: int, flag: str) -> str:
    """The value of a flag on the command line of a process."""
    words = argv(pid)
    return words[words.index(flag) + 1] if flag in words else ""


def held(nvml: FakeNvml) -> list[int]:
    """Bytes on each card, from what processes have registered and the test has set: the truth, whatever anybody read."""
    while True:
        seen = _registered(nvml)
        if seen == _registered(nvml):  # between two looks nobody came or went
            break
    found = []
    for gpu in nvml.gpus:
        own = gpu.used + sum(size or 0 for size in {**gpu.graphics, **gpu.compute}.values())
        found.append(own + sum(size for uuid, size in seen if uuid == gpu.uuid))
    return found


def _registered(nvml: FakeNvml) -> list[tuple[str, int]]:
    """One line of each file: those of the dead count until the library has seen that they are gone for long enough."""
    rows = []
    for name in sorted(os.listdir(nvml.procs)):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError):
                rows += [(row.split()[0], int(row.split()[1])) for row in (nvml.procs / name).read_text().splitlines()]
    return rows


class Watch:
    """Looks at the cards and at the ledger all the time, and keeps what it saw that must never be."""

    def __init__(self, daemon: Daemon, nvml: FakeNvml) -> None:
        self._daemon, self._nvml = daemon, nvml
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._watch_cards, self._watch_ledger)]
        self.looks = 0
        self.fullest = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _watch_cards(self) -> None:
        while not self._over.wait(0.01):
            for gpu, size in zip(self._nvml.gpus, held(self._nvml), strict=True):
                self.fullest = max(self.fullest, size)
                if size > gpu.total - gpu.reserved:
                    holders = sorted(path.name for path in self._nvml.procs.iterdir())
                    self.wrong.append(f"{time.monotonic():.3f}: {size / GIB:.2f} GiB on {gpu.uuid}, held by {holders}")

    def _watch_ledger(self) -> None:
        while not self._over.wait(0.05):
            self.looks += 1
            for each in self._daemon.get("/vram/status")["devices"]:
                if each["reserved_bytes"] > each["limit_bytes"]:
                    self.wrong.append(f"{time.monotonic():.3f}: {each}")


def layered_gguf(path: Path, layers: int, layer_mib: int) -> Path:
    """A model of many layers as far as its header tells. The file has holes where the tensors would be, so it takes no disk."""
    width = 4096

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def fact(key: str, value: int) -> bytes:
        return text(f"llama.{key}") + struct.pack("<II", 4, value)

    facts = {
        "block_count": layers,
        "context_length": 32768,
        "embedding_length": width,
        "feed_forward_length": width,
        "attention.head_count": 32,
        "attention.head_count_kv": 1,
    }
    rows = layer_mib * MIB // (2 * width)
    shapes = {"token_embd.weight": 1024, "output.weight": 1024, **{f"blk.{i}.ffn_up.weight": rows for i in range(layers)}}
    head = b"GGUF" + struct.pack("<Iqq", 3, len(shapes), len(facts) + 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama") + b"".join(fact(*item) for item in facts.items())
    offset = 0
    for name, count in shapes.items():
        head += text(name) + struct.pack("<IqqIQ", 2, width, count, 1, offset)
        offset += 2 * width * count
    head += bytes(-len(head) % 32)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + offset)
    return path


@contextlib.contextmanager
def process_holding(nvml: FakeNvml, index: int, gib: float) -> Iterator[int]:
    """A foreign program that holds memory on a card, from now until the block ends; its pid."""
    child = psutil.Popen(["sleep", "1000"])
    try:
        nvml.register(child.pid, {nvml.gpus[index].uuid: int(gib * GIB)})
        yield child.pid
    finally:
        child.kill()
        child.wait()
