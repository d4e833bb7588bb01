"""Which engines can be started here: their programs, found on PATH, and asked for their version and for the GPUs they can use."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from offloadd.accounts import Account, AccountError, find_account, step_to
from offloadd.backends.base import Backend
from offloadd.environment import engine_environment
from offloadd.observe.devices.aside import aside
from offloadd.state.desired import BackendKind, Engine
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
        if engine.kind is BackendKind.EXTERNAL:
            return EngineView(name=engine.name, gpus=frozenset())
        backend = self._backends.get(engine.adapter)
        if backend is None:
            problem = f"this version of offloadd cannot run {engine.adapter} yet"
            return EngineView(name=engine.name, problem=problem, hint="name an engine that it can run in backends")
        try:
            async with asyncio.timeout(_TIMEOUT):
                found, account, step = await aside(lambda: _look_for(engine), name=f"look for {engine.name}")
        except AccountError as error:
            hint = f"{error.hint} (backends.{engine.name})"
            return EngineView(name=engine.name, problem=error.message, hint=hint)
        except (OSError, TimeoutError) as error:
            problem = f"cannot look for {engine.command[0]}: {error or 'no answer from its disk'}"
            return EngineView(name=engine.name, problem=problem, hint="see PATH, and the disks that it names")
        if found is None:
            hint = f"install it, or set backends.{engine.name}.command to its full path"
            return EngineView(name=engine.name, problem=f"{engine.command[0]} is not on PATH", hint=hint)
        path, identity = found
        said = await self._ask(engine, backend, (*step, path), identity, account)
        return EngineView(name=engine.name, path=path, version=said.version, gpus=said.gpus)

    async def _ask(
        self, engine: Engine, backend: Backend, program: tuple[str, ...], identity: str, account: Account | None
    ) -> _Said:
        """What it says of itself; asked again next time when it did not answer."""
        key = (engine.name, identity, program, engine.command, tuple(sorted(engine.env.items())))
        if key in self._said:
            return self._said[key]
        version = await _run(engine, program, account, backend.version_argv) if backend.version_argv else ""
        devices = await _run(engine, program, account, backend.devices_argv) if backend.devices_argv else ""
        said = _Said(_version_in(version or ""), backend.read_devices(devices or ""))
        if version is not None and devices is not None:
            self._said = {old: known for old, known in self._said.items() if old[0] != engine.name}
            self._said[key] = said
        return said


def _look_for(engine: Engine) -> tuple[tuple[str, str] | None, Account | None, tuple[str, ...]]:
    """Its program as `_find` tells it, whom it runs as, and what stands before its command line for that. Blocks; AccountError."""
    account = find_account(engine.user, engine.group)
    return _find(engine.command[0]), account, step_to(account)


def _find(program: str) -> tuple[str, str] | None:
    """Its path, and what changes when another file takes its place; a store that gives all files one date is seen through."""
    path = shutil.which(program)
    if path is None:
        return None
    about = os.stat(path)  # noqa: PTH116
    return path, f"{os.path.realpath(path)}:{about.st_dev}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"


async def _run(engine: Engine, program: Sequence[str], account: Account | None, arguments: Sequence[str]) -> str | None:
    """All that the program prints, on either output; None when it does not end by itself in time. It runs as its servers will."""
    try:
        process = await asyncio.create_subprocess_exec(
            *program,
            *engine.command[1:],
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=engine_environment(engine.env, account.environment if account else None),
        )
    except OSError:
        return None
    try:
        assert process.stdout is not None  # noqa: S101  (asked for above)
        async with asyncio.timeout(_TIMEOUT):
            return (await _read_all(process.stdout)).decode(errors="replace")
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await process.wait()


async def _read_all(stream: asyncio.StreamReader) -> bytes:
    """Until its end; what comes after the bound is read and dropped, so that the program can go on to its own end."""
    kept = b""
    while chunk := await stream.read(_MOST):
        kept = (kept + chunk)[:_MOST]
    return kept


def _version_in(text: str) -> str:
    lines = text.splitlines()
    return next((line.split("version", 1)[1].strip(" :") for line in lines if "version" in line), "")[:120]
