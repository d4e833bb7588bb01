"""Another config, or other files on disk: what they name is looked at, then it is served, and what is gone is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from offloadd.api.listen import Listeners
from offloadd.catalog import Catalog
from offloadd.hosts import ReadyHosts
from offloadd.observe.snapshot import Observer
from offloadd.proxy.leases import LeaseBook
from offloadd.rounds import Rounds
from offloadd.runtime.executor import Executor
from offloadd.runtime.wishes import WishBook
from offloadd.state.desired import DesiredState


@dataclass(frozen=True, slots=True, kw_only=True)
class Turnover:
    """Each step is told that there is something else, and tells all those whom it concerns."""

    catalog: Catalog
    observer: Observer
    rounds: Rounds
    hosts: ReadyHosts
    executor: Executor
    book: LeaseBook
    wishes: WishBook
    config: Callable[[], DesiredState]
    """As it is in force."""
    other_files: asyncio.Event
    """Set when there are other models on disk."""
    listeners: Callable[[], Listeners]
    wake: Callable[[], None]

    async def before_config(self, desired: DesiredState) -> None:
        """PermanentError when a config that is good by itself is not for the sockets that systemd gave us."""
        self.listeners().check(desired.server)
        await self.rounds.look_ahead(desired)

    def after_config(self) -> None:
        """It is in force."""
        self.catalog.reloaded()
        self.rounds.look_soon()  # at files that were there before, and may be others by now
        self.wishes.yield_to_config(self.catalog.desired.models)
        self._forget_models()

    async def follow_files(self) -> None:
        """Serve what was found on disk, once it is known what it needs, and no longer what is gone. A step to be taken for ever."""
        await self.other_files.wait()
        self.other_files.clear()
        await self.catalog.prepare(self.config())
        await self.observer.consider(lambda: self.catalog.specs)
        self.catalog.publish()
        self._forget_models()

    def _forget_models(self) -> None:
        """Drop what is kept of models that are neither in the config nor on disk any more."""
        self.hosts.changed()
        models = self.catalog.desired.models
        self.executor.forget_models(models)
        self.book.forget_models(models.get)
        self.wake()
