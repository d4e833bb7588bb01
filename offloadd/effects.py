"""What a plan, and every change of an instance, means for all parts: done and told in one step, so that none sees half of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from offloadd.api.service import Service
from offloadd.chronicle import Chronicle
from offloadd.hosts import ReadyHosts
from offloadd.observe.snapshot import Observer
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.rounds import Rounds
from offloadd.runtime.executor import Executor
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.warm import Warmer
from offloadd.runtime.wishes import WishBook
from offloadd.state.actions import Plan
from offloadd.state.ids import InstanceId
from offloadd.state.observed import InstanceState


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """Those whom it concerns."""

    executor: Executor
    hosts: ReadyHosts
    book: LeaseBook
    pool: Pool
    rounds: Rounds
    loans: LoanBook
    warmer: Warmer
    wishes: WishBook
    service: Service
    observer: Observer
    chronicle: Chronicle
    wake: Callable[[], None]

    def apply(self, plan: Plan) -> None:
        """Begin the plan's actions, and tell those who wait for its decisions."""
        self.executor.apply(plan)
        if plan.actions:
            self.hosts.changed()
            self.rounds.stir()
        self.loans.refuse(plan)
        self.warmer.follow(plan.warm)
        self.service.changed()
        # Before the next request can come in: those that wait see the decisions and instances of this plan.
        self.book.serve_all()
        self.wishes.told(plan, self.executor.observed())
        if plan.read_now:
            self.rounds.read_now()

    def changed(self, instance: InstanceId) -> None:
        """An instance is in another state, or gone from the books."""
        self.hosts.changed()
        self.rounds.stir()
        self.book.serve_all()
        self._note(instance)
        ended = self.executor.get(instance)
        if ended is None:
            self.book.forget(instance)
        if ended is not None and ended.view().placement.gpus:
            self.rounds.look_soon()
        self.wake()

    def hang_up(self, instance: InstanceId, why: str, died: bool) -> None:
        """End the instance's requests, and every connection that is kept for the next: some servers wait for their clients."""
        self.book.hang_up(instance, why, died=died)
        ending = self.executor.get(instance)
        endpoint = ending.view().endpoint if ending is not None else None
        if endpoint is not None:
            self.pool.forget(endpoint)

    def _note(self, key: InstanceId) -> None:
        """Tell the registry's history what an instance has come to."""
        instance = self.executor.get(key)
        if instance is not None:
            view = replace(instance.view(), peak=self.observer.holdings.peak_of(key))
            ends = self.executor.observed().exits.get(key.model, ())[-1:]
            self.chronicle.note(view, instance.source_size, ends if view.state is InstanceState.EXITED else ())
