"""Which engines can be started here: their programs, found on PATH and asked for their version."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence

from offloadd.backends.base import Backend
from offloadd.state.desired import Engine
from offloadd.state.observed import EngineView
from offloadd.units import Seconds

_VERSION_TIMEOUT = Seconds(10)
_VERSION_BYTES = 4096


class EngineFinder:
    """Looks engines up; a program's version is asked for once, until its file changes."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._versions: dict[tuple[str, int, int], str] = {}

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
        version = await self._version(path, [*engine.command[1:], *backend.version_argv])
        return EngineView(name=engine.name, path=path, version=version)

    async def _version(self, path: str, arguments: Sequence[str]) -> str:
        about = await asyncio.to_thread(os.stat, path)
        key = (path, about.st_mtime_ns, about.st_size)
        if key not in self._versions:
            self._versions = {old: text for old, text in self._versions.items() if old[0] != path}
            self._versions[key] = await _ask_version(path, arguments)
        return self._versions[key]


async def _ask_version(path: str, arguments: Sequence[str]) -> str:
    """The first line that says "version", from either output; empty when the program does not tell in time."""
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError:
        return ""
    try:
        assert process.stdout is not None  # noqa: S101  (asked for above)
        async with asyncio.timeout(_VERSION_TIMEOUT):
            said = await process.stdout.read(_VERSION_BYTES)
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            try:
                process.kill()
            except ProcessLookupError:
                pass
        await process.wait()
    lines = said.decode(errors="replace").splitlines()
    return next((line.split("version", 1)[1].strip(" :") for line in lines if "version" in line.lower()), "")[:120]
