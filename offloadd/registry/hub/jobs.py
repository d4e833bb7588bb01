"""Pulls as jobs: a few at once, a bounded number in all, each a process that can be ended."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offloadd.errors import PermanentError, RequestError
from offloadd.events import EventKind, about
from offloadd.registry.hub.choose import parse_wanted
from offloadd.units import Seconds

log = logging.getLogger(__name__)

MAX_AT_ONCE = 2
MAX_WAITING = 16
KEPT_ENDED = 32
PROGRESS_S = 0.25
"""How often a job's progress is looked at; its files on disk tell it."""
PATIENCE_S = 5.0
"""From a polite request to end until it is killed."""
_LINE = 2**20
_ENDED = frozenset({"landed", "failed", "cancelled"})


@dataclass(slots=True)
class Job:
    """One pull. `state`: waiting, asking, chosen, downloading, verifying, landed, failed or cancelled."""

    id: str
    source: str
    folder: str
    created: float
    state: str = "waiting"
    file: str = ""
    files: list[str] = field(default_factory=list)
    total: int | None = None
    done: int = 0
    message: str = ""
    hint: str = ""
    paths: list[str] = field(default_factory=list)
    staging: str = ""
    version: int = 0
    """Grows with every change."""
    is_cancelled: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in _ENDED

    def shown(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            "source": self.source,
            "folder": self.folder,
            "created_at": self.created,
            "state": self.state,
            "file": self.file,
            "files": self.files,
            "total_bytes": self.total,
            "done_bytes": self.total if self.state == "landed" else self.done,
            "message": self.message,
            "hint": self.hint,
            "paths": self.paths,
        }


class Pulls:
    """Every pull of this daemon. `landed` is called after each that brought something."""

    def __init__(self, *, folder: Callable[[], str], wall: Callable[[], float], landed: Callable[[], None]) -> None:
        self._folder = folder
        self._wall = wall
        self._landed = landed
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._changed = asyncio.Condition()

    def start(self, source: str) -> Job:
        """Begin a pull, or give the one of the same that runs; RequestError when there are too many or it names nothing."""
        try:
            wanted = str(parse_wanted(source))
        except PermanentError as error:
            raise RequestError(400, "bad_source", f"{error.message}: {error.hint}", param="source") from None
        same = next((job for job in self._jobs.values() if job.source == wanted and not job.has_ended), None)
        if same is not None:
            return same
        if len(self._tasks) >= MAX_WAITING:
            raise RequestError(429, "too_many_pulls", f"{MAX_WAITING} pulls run or wait already", retry_after=Seconds(30))
        job = Job(id=uuid.uuid4().hex[:12], source=wanted, folder=self._folder(), created=self._wall())
        self._jobs[job.id] = job
        self._forget_old()
        self._tasks[job.id] = asyncio.create_task(self._run(job), name=f"pull {wanted}")
        return job

    def all(self) -> Sequence[Job]:
        """Those that run, wait, or ended lately."""
        return list(self._jobs.values())

    def get(self, key: str) -> Job:
        """RequestError 404 when there is none."""
        job = self._jobs.get(key)
        if job is None:
            raise RequestError(404, "pull_not_found", "there is no such pull; GET /pulls lists them")
        return job

    def cancel(self, key: str) -> Job:
        """End it; what was downloaded is kept for another try."""
        job = self.get(key)
        if not job.has_ended:
            job.is_cancelled = True
            self._tasks[key].cancel()
        return job

    async def follow(self, key: str) -> AsyncIterator[Job]:
        """The job now, and after each change, until it has ended."""
        job, seen = self.get(key), -1
        while True:
            async with self._changed:
                while job.version == seen:
                    await self._changed.wait()
            seen = job.version
            yield job
            if job.has_ended:
                return

    async def close(self) -> None:
        """End all."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_old(self) -> None:
        ended = [key for key, job in self._jobs.items() if job.has_ended]
        for key in ended[: max(0, len(ended) - KEPT_ENDED)]:
            del self._jobs[key]

    async def _run(self, job: Job) -> None:
        try:
            async with self._slots:
                await self._download(job)
        except asyncio.CancelledError:
            await self._set(job, state="cancelled", message="cancelled; what was downloaded is kept for another try")
        except Exception as error:
            log.exception("the pull of %s failed", job.source, extra=about(EventKind.INTERNAL_ERROR))
            await self._set(job, state="failed", message=f"internal error: {error}", hint="this is a bug: see the log")
        finally:
            del self._tasks[job.id]
            said = about(EventKind.PULL, source=job.source, state=job.state)
            log.info("pull of %s: %s%s", job.source, job.state, f": {job.message}" if job.message else "", extra=said)

    async def _download(self, job: Job) -> None:
        log.info("pull of %s into %s begins", job.source, job.folder, extra=about(EventKind.PULL, source=job.source))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "offloadd.registry.hub.fetch", job.source, job.folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            limit=_LINE,
            start_new_session=True,
        )
        watcher = asyncio.create_task(self._watch(job))
        try:
            assert process.stdout is not None  # noqa: S101  (asked for above)
            async for line in process.stdout:
                await self._hear(job, line)
            code = await process.wait()
            if not job.has_ended:
                await self._set(job, state="failed", message=f"the download's process ended with {code}", hint="pull it again")
        finally:
            watcher.cancel()
            await _end(process)

    async def _hear(self, job: Job, line: bytes) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return
        event = said.pop("event", "")
        names = {"total_bytes": "total", "size_bytes": None, "revision": None}
        if event == "landed":
            self._landed()
        changes = {names.get(key, key): value for key, value in said.items() if names.get(key, key)}
        await self._set(job, state=event, **changes)

    async def _watch(self, job: Job) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            if job.staging:
                done = await asyncio.to_thread(_bytes_below, Path(job.staging))
                if done != job.done and not job.has_ended:
                    await self._set(job, done=min(done, job.total or done))

    async def _set(self, job: Job, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(job, name, value)
        job.version += 1
        async with self._changed:
            self._changed.notify_all()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()


def _bytes_below(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
    return total
