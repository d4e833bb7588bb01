"""Which engines can be started here: their programs, found on PATH, and asked for their version and for the GPUs they can use."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from offloadd.backends.base import Backend
from offloadd.environment import engine_environment
from offloadd.state.desired import Engine
from offloadd.state.ids import DeviceKind
from offloadd.state.observed import EngineView
from offloadd.units import Seconds

_TIMEOUT = Seconds(10)
_MOST = 16 * 1024


@dataclass(frozen=True, slots=True)
class _Said:
    """What a program says of itself."""

    version: str
    gpus: frozenset[DeviceKind] | None


class EngineFinder:
    """Looks engines up; a program is asked about itself once, until its file changes."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._said: dict[tuple[object, ...], _Said] = {}

    async def look(self, engine: Engine) -> EngineView:
        """Find one engine's program; what is wrong is said in the view."""
        backend = self._backends.get(engine.adapter)
        if backend is None:
            problem = f"this version of offloadd cannot run {engine.adapter} yet"
            return EngineView(name=engine.name, problem=problem, hint="name an engine that it can run in backends")
        path = await asyncio.to_thread(shutil.which, engine.command[0])
        if path is None:
            hint = f"install it, or set backends.{engine.name}.command to its full path"
            return EngineView(name=engine.name, problem=f"{engine.command[0]} is not on PATH", hint=hint)
        said = await self._ask(engine, backend, path)
        return EngineView(name=engine.name, path=path, version=said.version, gpus=said.gpus)

    async def _ask(self, engine: Engine, backend: Backend, path: str) -> _Said:
        about = await asyncio.to_thread(os.stat, path)
        key = (engine.name, engine.command, tuple(sorted(engine.env.items())), about.st_mtime_ns, about.st_size)
        if key not in self._said:
            self._said = {old: said for old, said in self._said.items() if old[0] != engine.name}
            version = await _run(engine, path, backend.version_argv)
            devices = await _run(engine, path, backend.devices_argv) if backend.devices_argv else ""
            self._said[key] = _Said(_version_in(version), backend.read_devices(devices))
        return self._said[key]


async def _run(engine: Engine, path: str, arguments: Sequence[str]) -> str:
    """What the program prints, on either output; empty when it does not end in time."""
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            *engine.command[1:],
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=engine_environment(engine.env),
        )
    except OSError:
        return ""
    try:
        assert process.stdout is not None  # noqa: S101  (asked for above)
        async with asyncio.timeout(_TIMEOUT):
            return (await process.stdout.read(_MOST)).decode(errors="replace")
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def _version_in(text: str) -> str:
    lines = text.splitlines()
    return next((line.split("version", 1)[1].strip(" :") for line in lines if "version" in line), "")[:120]
