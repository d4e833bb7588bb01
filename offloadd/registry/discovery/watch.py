"""Keeps knowing what is on disk: by the kernel's events where there are some, and by a slow poll that costs next to nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offloadd.events import EventKind, about
from offloadd.folders import FolderWatch
from offloadd.lookout import Lookout, Pause
from offloadd.registry.discovery.scan import Scan, Scanner
from offloadd.registry.discovery.stores import Store
from offloadd.state.found import Found, Shelf
from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import ModelShape
from offloadd.units import Seconds, counted

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Everything is looked at this often even when no event comes: network disks send none."""
SHARE = 0.02
"""Of one core that looking may take: what takes long is done less often."""
LONGEST_POLL_S = 300.0
MAX_WATCHED = 4000
"""Folders that are watched for events; the others are left to the poll."""
FIRST_S = 5.0
"""So long a start waits for the first look; a disk that takes longer is waited for while models of the config are served."""
LATE_S = 60.0
"""A look that takes longer is a problem that is told."""
LEAST_S = 0.1
LEAST_SHARE = 10
"""Between two looks lies at least this time, and this multiple of what the last one took, however many events come."""
_LATE = "takes very long: is a disk not answering?"


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """One look, and what it brought: all that takes long with very many models is done before the loop sees it."""

    scan: Scan
    changed: Mapping[str, Found | None]
    """By path; None of what is gone."""
    found: Mapping[ModelName, Found]
    facts: Mapping[str, ModelFacts]


class Discovery:
    """The models on disk, as last seen. `changed` is called on the loop with what is new, other or (None) gone, by path."""

    def __init__(
        self,
        *,
        stores: Callable[[], Sequence[Store]],
        read_shape: Callable[[Path], ModelShape],
        changed: Callable[[Mapping[str, Found | None]], None],
    ) -> None:
        self._stores = stores
        self._read_shape = read_shape
        self._changed = changed
        self._scanner = Scanner(read_shape)
        self._scan = Scan()
        self._seen = Scan()
        """What the thread that looks saw last; what the loop knows of it is `_scan`."""
        self._took = 0.0
        self._lookout = Lookout(self._look, self._pause, name="search for models")
        self._first = asyncio.Event()
        self._moved = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self.found: Mapping[ModelName, Found] = {}
        self.facts: Mapping[str, ModelFacts] = {}
        """Of every file that a found model is loaded from, by path."""

    @property
    def problems(self) -> Mapping[str, str]:
        """What could not be looked at, and why."""
        late = {"the search for models": _LATE} if self._lookout.lasts > LATE_S else {}
        return {**self._scan.problems, **late}

    def begin(self, shelf: Shelf) -> None:
        """Take what an earlier daemon saw for true until the first look says otherwise."""
        self._scanner = Scanner(self._read_shape, shelf)
        self._take(_news(Scan(found=shelf.present), {}))

    async def first(self) -> None:
        """Take the first look; one that takes long goes on while others go on too."""
        self._looking = asyncio.create_task(self._next(), name="first look for models")
        await asyncio.wait({self._looking}, timeout=FIRST_S)

    def look_soon(self) -> None:
        """Look again now: the stores are others, or something was put there."""
        self._lookout.soon()

    async def attend(self) -> None:
        """Wait until a look finds anything new, and take it."""
        looking, self._looking = self._looking, None
        await (looking or self._next())
        self._first.set()

    async def _next(self) -> None:
        self._take(await self._lookout.news())

    def _look(self) -> News | None:
        """One look at all stores; None when nothing is new. Blocks."""
        begun = time.monotonic()
        scan, seen = self._scanner.scan(self._stores()), self._seen
        self._seen, self._took = scan, time.monotonic() - begun
        return None if scan is seen else _news(scan, self._scan.found)

    def _pause(self) -> Pause:
        """Until an event, the poll, or the moment in which something is due; and a while, however many events there are."""
        poll = min(LONGEST_POLL_S, max(POLL_S, self._took / SHARE))
        due = self._seen.due
        return Pause(
            least=Seconds(max(LEAST_S, self._took * LEAST_SHARE)), most=Seconds(poll if due is None else min(poll, max(0.0, due)))
        )

    def _take(self, news: News) -> None:
        """What was found, if it is other than before."""
        before = self._scan.found
        if news.scan.folders != self._scan.folders:
            self._moved.set()
        self._scan = news.scan
        if not news.changed:
            return
        self.found, self.facts = news.found, news.facts
        self._tell(news.changed, before)
        self._changed(news.changed)

    def _tell(self, changed: Mapping[str, Found | None], before: Mapping[str, Found]) -> None:
        """One line each, or one for all where there are many."""
        if len(changed) > 20:
            log.info("%s found on disk", counted(len(self.found), "model", "models"), extra=about(EventKind.MODELS_FOUND))
            return
        for path, found in changed.items():
            if found is None:
                log.info("%s is gone: %s", before[path].name, path, extra=about(EventKind.MODEL_GONE, model=before[path].name))
            elif path not in before or found.facts.problem != before[path].facts.problem:
                state = found.facts.problem or "is here"
                log.info("%s: %s %s", found.name, path, state, extra=about(EventKind.MODELS_FOUND, model=found.name))

    async def watch(self) -> None:
        """Look soon after each event in the folders, until other folders are the ones to watch."""
        await self._first.wait()
        folders = self._scan.folders
        watcher = FolderWatch(map(Path, sorted(folders)[:MAX_WATCHED]), self.look_soon)
        try:
            self.look_soon()  # for what happened before it was watched
            while self._scan.folders == folders:
                self._moved.clear()
                await self._moved.wait()
        finally:
            watcher.stop()


def _news(scan: Scan, before: Mapping[str, Found]) -> News:
    changed: dict[str, Found | None] = {}
    if scan.found is not before:
        changed.update((path, found) for path, found in scan.found.items() if _is_other(before.get(path), found))
        changed.update(dict.fromkeys(before.keys() - scan.found.keys()))
    if not changed:
        return News(scan=scan, changed={}, found={}, facts={})
    found = {each.name: each for each in scan.found.values()}
    return News(scan=scan, changed=changed, found=found, facts=dict(_facts(scan.found.values())))


def _is_other(before: Found | None, found: Found) -> bool:
    return before is not found and before != found


def _facts(found: Iterable[Found]) -> Iterable[tuple[str, ModelFacts]]:
    for each in found:
        for facts in (each.facts, each.projector):
            if facts is not None:
                yield facts.path, facts
