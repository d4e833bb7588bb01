"""The three pictures that are compared, as of the moment at which they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from offloadd.catalog import Catalog
from offloadd.observe.snapshot import Observer
from offloadd.proxy.keeping import KeepBook
from offloadd.proxy.leases import LeaseBook
from offloadd.runtime.executor import Executor
from offloadd.runtime.loans import LoanBook
from offloadd.runtime.wishes import WishBook
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.observed import ObservedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Joins each of them from the parts that know of it. Quick; nothing is read for it."""

    catalog: Catalog
    keeping: KeepBook
    executor: Executor
    observer: Observer
    book: LeaseBook
    loans: LoanBook
    wishes: WishBook
    closing: Callable[[], bool]
    """Whether all is to be stopped, and nothing to be started any more."""

    def desired(self) -> DesiredState:
        """What is to be served: the config, the models on disk and clients' wishes for how long theirs stay."""
        applied = self.catalog.desired
        if self.closing():
            return replace(applied, models={}, closing=True)
        return self.keeping.applied_to(applied, self.executor.views())

    def observed(self) -> ObservedState:
        """Instances, and the latest readings of the machine."""
        return self.observer.snapshot(self.executor.observed())

    def demand(self) -> Demand:
        """What requests, borrowers and operators wait for or hold."""
        return self.wishes.join(replace(self.book.demand(), loans=self.loans.loans()))
