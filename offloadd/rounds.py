"""What is looked at again and again beside the reconcile loop: the machine, the instances' logs, their engines' load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Hashable
from contextlib import suppress
from dataclasses import dataclass

from offloadd.catalog import Catalog
from offloadd.chronicle import Chronicle
from offloadd.events import EventKind, about
from offloadd.observe.snapshot import Observer
from offloadd.registry.lives import LifeBook
from offloadd.runtime.executor import Executor
from offloadd.runtime.forward import Forwarder
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.logs import LogFolder
from offloadd.runtime.signals import Signals
from offloadd.state.actions import ModelState, Plan
from offloadd.state.desired import DesiredState
from offloadd.state.ids import InstanceId
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import Seconds

log = logging.getLogger(__name__)

RELEASE_POLL = Seconds(0.1)
"""How often devices are read while memory of an ended instance is on its way back."""
REFRESH = Seconds(2)
"""How often devices, engines and model files are looked at again."""
QUIET_REFRESH = Seconds(9.5)
"""The same while nothing runs and nobody waits; what is to be given is read again before it is given.

A little more often than the reconcile loop cycles by itself, which then has no need to.
"""
TRIM = Seconds(1)
"""How often instances' logs are checked against their bound."""


async def keep(what: str, step: Callable[[], Awaitable[None]]) -> None:
    """Take the step for ever. One that fails is logged, and the next is taken: no loop may take the servers down with it."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("%s failed", what, extra=about(EventKind.INTERNAL_ERROR))
            await asyncio.sleep(REFRESH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Premises:
    """What there is to look at, and who is told."""

    observer: Observer
    catalog: Catalog
    executor: Executor
    loans: LoanBook
    chronicle: Chronicle
    signals: Signals
    forwarder: Forwarder
    logs: LogFolder
    lives: LifeBook
    observed: Callable[[], ObservedState]
    latest: Callable[[], Plan]
    wake: Callable[[], None]


class Rounds:
    """Each of its coroutines is a step to be taken for ever (`keep`), which pauses long where there is nothing to look at.

    `look_ahead` aside, which is for whoever is about to have another config served.
    """

    def __init__(self, premises: Premises) -> None:
        self._premises = premises
        self._look_soon = asyncio.Event()
        self._read_now = asyncio.Event()
        self._stirred = asyncio.Event()
        """Set when an instance begins or changes: who looks after instances sleeps while there are none."""
        self._tended = True
        """Whether logs of instances may have to be seen to once more."""

    def look_soon(self) -> None:
        """Something about the machine may be different."""
        self._look_soon.set()

    def read_now(self) -> None:
        """Memory is to be given, and the last reading of it is too old for that."""
        self._read_now.set()
        self._look_soon.set()

    def stir(self) -> None:
        """An instance has begun or changed."""
        self._stirred.set()

    async def look_ahead(self, desired: DesiredState) -> None:
        """Read the files and engines that a new config names, so that the first plan for it knows them."""
        catalog = self._premises.catalog
        await catalog.prepare(desired)
        await self._premises.observer.look_ahead(catalog.with_config(desired), self._pids)

    async def look_again(self) -> None:
        """Look again after a while, or soon after an instance has ended, until its memory is seen to be free."""
        premises = self._premises
        views = premises.observed().instances.values()
        soon = any(view.unreleased or view.state is InstanceState.FALLING_ASLEEP for view in views)
        with suppress(TimeoutError):
            async with asyncio.timeout(RELEASE_POLL if soon else QUIET_REFRESH if self._quiet() else REFRESH):
                await self._look_soon.wait()
        self._look_soon.clear()
        loaded = self._ready()
        if soon or self._read_now.is_set():
            self._read_now.clear()
            await premises.observer.read_memory(self._pids)
        else:
            await premises.observer.refresh(lambda: premises.catalog.specs, self._pids)
        premises.observer.holdings.forget({*premises.executor.views(), *premises.loans.loans()})
        premises.wake()
        self._learn(loaded & self._ready())

    async def ask_engines(self) -> None:
        """Ask engines for their load, where there are any."""
        await self._until_stirred()
        await self._premises.signals.attend()

    async def trim_logs(self) -> None:
        """Pass on what instances wrote and keep it within its bound; write again what could not be written of their lives."""
        premises = self._premises
        if not self._tended and not premises.lives.problem:
            await self._until_stirred()
        await asyncio.sleep(TRIM)
        views = premises.executor.views()
        if not views and not self._tended and not premises.lives.problem:
            return  # nobody writes, and a change of threads for nothing is a good part of what an idle daemon costs
        self._tended = bool(views)

        def tend() -> None:
            premises.forwarder.forward(views)
            premises.logs.trim(list(views))
            premises.lives.retry()

        await asyncio.to_thread(tend)  # in one step: each costs an idle daemon as much as what it does

    def _quiet(self) -> bool:
        """Whether nothing runs, nobody waits, and no model is wanted that cannot be had: then nobody needs a new reading."""
        waits = any(decision.state is not ModelState.OFF for decision in self._premises.latest().decisions.values())
        return not waits and not self._premises.executor.views() and not self._premises.loans.loans()

    def _ready(self) -> set[InstanceId]:
        return {key for key, view in self._premises.executor.views().items() if view.state is InstanceState.READY}

    def _learn(self, loaded: Container[InstanceId]) -> None:
        """Keep what instances that were `loaded` all through a reading were seen to take, for the next launch of the same kind."""
        chronicle, observer = self._premises.chronicle, self._premises.observer
        news = chronicle.learn(view for key, view in self._premises.observed().instances.items() if key in loaded)
        moved = chronicle.rename(offer for offers in observer.candidates.values() for offer in offers)
        if news or moved:
            observer.know(chronicle.recorder.footprints)

    async def _until_stirred(self) -> None:
        """Wait until there may be instances, where there are none; not for ever, since other things may need an eye too."""
        self._stirred.clear()
        if not self._premises.executor.views():
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_REFRESH):
                    await self._stirred.wait()

    def _pids(self) -> dict[Hashable, int]:
        """Leaders of all process trees whose memory is measured."""
        pids: list[tuple[Hashable, int]] = [*self._premises.executor.pids().items(), *self._premises.loans.pids().items()]
        return dict(pids)
