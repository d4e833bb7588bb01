"""A `libnvidia-ml.so.1` that tests command: `build` compiles it, `FakeNvml` writes the file that it reads on every call.

In-process: `load()` once, then a `FakeNvml` whose `environment` is in os.environ. Once loaded the library stays for the life of
the process, and without FAKE_NVML_STATE it behaves like a missing library. For another process: start it with
`FakeNvml.environment` and `LD_LIBRARY_PATH` = the folder of `build()`; neither belongs in the environment of a real engine.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).with_name("fake_nvml.c")
GIB = 2**30


@functools.cache
def compiler() -> str:
    """Path of a C compiler; empty where there is none."""
    return shutil.which("gcc") or shutil.which("cc") or ""


def missing() -> str:
    """Why the fake cannot be used in this process; empty when it can."""
    if not compiler():
        return "no C compiler for the fake libnvidia-ml.so.1"
    if pynvml.nvmlLib is not None and not hasattr(pynvml.nvmlLib, "fake_nvml"):
        return "the driver's own libnvidia-ml.so.1 is loaded already"
    return ""


@functools.cache
def build() -> Path:
    """Compile the library, once per process, in a folder that goes away with it; raise CalledProcessError with gcc's words."""
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libnvidia-ml.so.1"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler(), *options, "-o", str(library), str(SOURCE), "-lpthread"], check=True)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Load it into this process, where nvidia-ml-py then finds it by its SONAME; before anything calls nvmlInit."""
    return ctypes.CDLL(str(build()))


@dataclass(kw_only=True)
class FakeGpu:
    """One card or MIG slice. Sizes in bytes, power in mW, utilization in percent; None is "not supported"."""

    uuid: str
    name: str = "NVIDIA GeForce RTX 4090"
    total: int = 24 * GIB
    reserved: int = GIB // 2
    used: int = 0
    """Held by the system, by no process."""
    utilization: int | None = 0
    temperature: int | None = 40
    power: int | None = 30_000
    bus: str = "00000000:01:00.0"
    mig: int | None = None
    slices: dict[int, FakeGpu] = field(default_factory=dict)
    """By slot; slots may have gaps."""
    compute: dict[int, int | None] = field(default_factory=dict)
    """Bytes by pid; None is "not available"."""
    graphics: dict[int, int | None] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    """Return code by exported symbol; `*` is every call that takes the card's handle."""
    late: list[tuple[int, float]] = field(default_factory=list)
    """Bytes that no process holds any more and that count as used until this reading of `time.monotonic()`."""
    xid: tuple[int, int] | None = None
    """Sequence number and XID of the latest event."""

    def lines(self, target: str) -> Iterator[str]:
        """Its part of the state file."""
        keys = ("uuid", "name", "bus", "total", "reserved", "used", "utilization", "temperature", "power", "mig")
        facts = {key: value for key in keys if (value := getattr(self, key)) is not None}
        rows = [f"{key} {value}" for key, value in facts.items()]
        rows += [f"error {call} {code}" for call, code in self.errors.items()]
        for kind, held in (("compute", self.compute), ("graphics", self.graphics)):
            rows += [f"{kind} {pid} {'none' if size is None else size}" for pid, size in held.items()]
        rows += [f"late {size} {until:.6f}" for size, until in self.late]
        rows += [f"xid {self.xid[0]} {self.xid[1]}"] if self.xid else []
        yield from (f"gpu {target} {row}" for row in rows)
        for slot, each in self.slices.items():
            yield from each.lines(f"{target}/{slot}")


class FakeNvml:
    """What the fake shows. Change the attributes, then `write`; a reading under way sees the old file or the new one, whole."""

    def __init__(self, folder: Path, gpus: int = 1) -> None:
        self.state = folder / "nvml.state"
        self.procs = folder / "nvml.procs"
        self.calls = folder / "nvml.calls"
        self.procs.mkdir(exist_ok=True)
        self.driver = "580.95.05"
        self.nvml = "13.580.95.05"
        self.cuda = 13000
        self.init_error = 0
        self.epoch = 0
        """Change it, and every session that was open is dead, as after the driver was loaded anew."""
        self.release_lag_ms = 0
        self.errors: dict[str, int] = {}
        self.sleeps: dict[str, float] = {}
        self.gpus = [FakeGpu(uuid=_uuid(i), bus=f"00000000:{i + 1:02x}:00.0") for i in range(gpus)]
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        """What a process that loads the fake needs; LD_LIBRARY_PATH as well when it is to be found by name."""
        return {"FAKE_NVML_STATE": str(self.state), "FAKE_NVML_PROCS": str(self.procs), "FAKE_NVML_CALLS": str(self.calls)}

    def write(self) -> None:
        """Make it so, at once for whoever reads next."""
        facts = ("driver", "nvml", "cuda", "init_error", "epoch", "release_lag_ms")
        rows = [f"{key} {getattr(self, key)}" for key in facts]
        rows += [f"error {call} {code}" for call, code in self.errors.items()]
        rows += [f"sleep {call} {seconds}" for call, seconds in self.sleeps.items()]
        rows += [row for i, gpu in enumerate(self.gpus) for row in gpu.lines(str(i))]
        fresh = self.state.with_suffix(".new")
        fresh.write_text("\n".join(rows) + "\n", errors="surrogateescape")
        os.replace(fresh, self.state)

    def register(self, pid: int, sizes: dict[str, int]) -> None:
        """Let a process hold memory while it lives: bytes by card, given as `0`, `0/2` or a UUID."""
        fresh = self.procs / f"{pid}.new"
        fresh.write_text("".join(f"{target} {size}\n" for target, size in sizes.items()))
        os.replace(fresh, self.procs / str(pid))

    def count(self, call: str) -> int:
        """How often an exported symbol was called."""
        return self.calls.read_text().split().count(call) if self.calls.exists() else 0

    def until_called(self, call: str, within_s: float = 5) -> None:
        """Wait for a call, such as one that hangs; raise TimeoutError."""
        deadline = time.monotonic() + within_s
        while not self.count(call):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{call} was not called within {within_s:g} s")
            time.sleep(0.005)


def use(patch: pytest.MonkeyPatch, folder: Path, gpus: int = 1) -> FakeNvml:
    """The fake in this process, for as long as `patch` lasts; skips the test where it cannot be had."""
    if missing():
        pytest.skip(missing())
    load()
    fake = FakeNvml(folder, gpus)
    for name, value in fake.environment.items():
        patch.setenv(name, value)
    return fake


def _uuid(index: int) -> str:
    return f"GPU-{index:08x}-0000-4000-8000-{index:012x}"
