"""Reload: read, validate, swap the whole DesiredState or keep the last good one. One path for every way of asking."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from offloadd import redaction
from offloadd.backends.base import Backend
from offloadd.clock import Clock
from offloadd.config import ConfigUnreadableError, Loaded, SystemSecrets, load, read_sources
from offloadd.config.diagnostics import Diagnostic, render_text
from offloadd.config.known import Former
from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.folders import FolderWatch
from offloadd.lookout import Lookout, Pause
from offloadd.runtime.eye import Eye, Sight, digest_of
from offloadd.state.desired import DesiredState
from offloadd.units import Seconds

log = logging.getLogger(__name__)

POLL = Seconds(2)
"""The file is looked at this often even when no event comes: symlink swaps and network disks send none."""
LIMIT = Seconds(60)
"""A reload that takes longer, as on a dead network disk, is given up: whoever waits for it gets an answer."""
BLIND_AFTER = 3
"""Failures in a row to watch the folders after which that is told: one may be a folder swapped at that moment."""
SETTLE = Seconds(0.1)
"""A file must read the same twice, this far apart, before a change of it is taken up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try to apply the config: when, whether it was taken, and what there was to say."""

    wall: float = 0.0
    """Seconds since the epoch."""
    applied: bool = False
    message: str = ""
    """Why the config could not be read at all; empty when it could."""
    loaded: Loaded | None = None

    @property
    def diagnostics(self) -> Sequence[Diagnostic]:
        """Errors, warnings and notes with their places."""
        return self.loaded.diagnostics if self.loaded else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The config in force."""

    desired: DesiredState
    shown: Mapping[str, object] = field(default_factory=dict)
    """As written, secrets hidden."""
    wall: float = 0.0


class ConfigStore:
    """The config in force and the last attempt to change it."""

    def __init__(self, path: Path, *, backends: Mapping[str, Backend], clock: Clock) -> None:
        self.path = path
        self._backends = backends
        self._clock = clock
        self._before: Callable[[DesiredState], Awaitable[None]] | None = None
        self._after: Callable[[], None] | None = None
        self._around: Callable[[], AbstractContextManager[None]] = nullcontext
        self._lock = asyncio.Lock()
        self._queued: asyncio.Task[Attempt] | None = None
        self._digest = b""
        self._former = Former()
        """Of the config in force, what need not be worked out again for the next one."""
        self.blind = ""
        """Why changes of the file bring no event, so that it is only looked at now and then; empty when they do."""
        self.applied = Applied(desired=DesiredState())
        self.attempt = Attempt()

    async def start(self) -> None:
        """Apply the config for the first time; PermanentError with all diagnostics when it is not good."""
        attempt = await self.reload("start")
        if not attempt.applied:
            raise PermanentError(explain(attempt))

    def follow(
        self,
        *,
        before: Callable[[DesiredState], Awaitable[None]],
        after: Callable[[], None],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`before` is awaited with a good config ahead of each swap, to look at what it names; `after` is called right after it.
        With a PermanentError `before` refuses it.

        `around` is entered when a reload begins and left when its outcome is known, good or bad.
        """
        self._before, self._after, self._around = before, after, around

    async def reload(self, why: str) -> Attempt:
        """Read the config now and apply it if it is good.

        Calls during a reload share one that begins after it, so a storm of them costs at most one running and one waiting.
        """
        if self._queued is None:
            self._queued = asyncio.create_task(self._reload(why), name="reload")
        return await asyncio.shield(self._queued)

    async def watch(self) -> None:
        """Reload whenever the content changes, by event or by poll."""
        stirred, eye, failures = threading.Event(), Eye(self.path), 0

        def happened() -> None:
            stirred.set()
            lookout.soon()

        def look() -> Sight | None:
            known = self._digest
            if stirred.is_set() or watch.problem or failures or not watch.folders:
                stirred.clear()
                known = b""  # the folders to watch may be others
            return eye.look(known)

        watch = FolderWatch((), happened)
        lookout = Lookout(look, lambda: Pause(most=POLL), name="watch of the config")
        try:
            while True:
                folders = await self._settled(eye, await lookout.news())
                failures = failures + 1 if watch.problem else 0
                self.blind = watch.problem if failures >= BLIND_AFTER else ""
                if watch.problem or folders != watch.folders:
                    watch.stop()
                    watch = FolderWatch(folders, happened)
        finally:
            watch.stop()

    async def _reload(self, why: str) -> Attempt:
        async with self._lock:
            self._queued = None
            with self._around():
                self.attempt = await self._outcome(why)
            return self.attempt

    async def _outcome(self, why: str) -> Attempt:
        try:
            async with asyncio.timeout(LIMIT):
                return await self._try(why)
        except TimeoutError:
            return self._refused(Attempt(wall=self._clock.wall(), message=f"reading it took longer than {LIMIT:g} s"), why)
        except Exception as error:
            # The config in force stays in force, and the next reload may fare better.
            log.exception("reload (%s) failed", why, extra=about(EventKind.INTERNAL_ERROR))
            return Attempt(wall=self._clock.wall(), message=f"internal error: {type(error).__name__}: {error}")

    async def _try(self, why: str) -> Attempt:
        try:
            sources = await asyncio.to_thread(read_sources, self.path)
        except ConfigUnreadableError as error:
            return self._refused(Attempt(wall=self._clock.wall(), message=str(error)), why)
        self._digest = digest_of(sources)
        secrets = SystemSecrets()
        loaded = await asyncio.to_thread(load, sources, backends=self._backends, secrets=secrets, former=self._former)
        redaction.hide(secrets.known | loaded.secrets)
        if loaded.desired is None:
            return self._refused(Attempt(wall=self._clock.wall(), loaded=loaded), why)
        desired = replace(loaded.desired, generation=self.applied.desired.generation + 1)
        if self._before is not None:
            try:
                await self._before(desired)
            except PermanentError as error:
                return self._refused(Attempt(wall=self._clock.wall(), message=f"{error.message}: {error.hint}"), why)
        self._former = loaded.former
        self.applied = Applied(desired=desired, shown=loaded.shown, wall=self._clock.wall())
        if self._after is not None:
            self._after()
        count, said = len(desired.models), about(EventKind.CONFIG_APPLIED, generation=desired.generation)
        log.info("config generation %d applied (%s): %d models", desired.generation, why, count, extra=said)
        return Attempt(wall=self._clock.wall(), applied=True, loaded=loaded)

    def _refused(self, attempt: Attempt, why: str) -> Attempt:
        generation = self.applied.desired.generation
        said = about(EventKind.CONFIG_REFUSED, generation=generation)
        log.error("config refused (%s); generation %d stays:\n%s", why, generation, explain(attempt), extra=said)
        return attempt

    async def _settled(self, eye: Eye, first: Sight) -> frozenset[Path]:
        """Reload when the content is not what was last tried, and has settled; the folders to watch from now on."""
        if first.digest == self._digest:
            return first.folders
        await asyncio.sleep(SETTLE)
        again = await asyncio.to_thread(eye.look)
        if again is None or first.digest != again.digest:
            return first.folders  # it is looked at again soon
        self._digest = first.digest
        await self.reload("its file changed")
        return again.folders


def explain(attempt: Attempt) -> str:
    """The attempt's errors as text, for a log or a terminal."""
    if attempt.loaded is None:
        return attempt.message
    return render_text(attempt.loaded.errors, attempt.loaded.sources, attempt.loaded.hidden)
