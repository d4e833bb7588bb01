"""Who holds which instance, from grant to last byte. Counted as they come and go: a thousand would be the most of the work."""

from __future__ import annotations

from collections.abc import Callable, Collection

from offloadd.proxy.lease import Lease
from offloadd.state.ids import InstanceId


class Holds:
    """All leases that are held, by instance."""

    def __init__(self, forgotten: Callable[[InstanceId], None]) -> None:
        """`forgotten` is told of an instance that is off the books, once nobody holds it any more."""
        self._forgotten = forgotten
        self._leases: dict[InstanceId, set[Lease]] = {}
        self.counts: dict[InstanceId, int] = {}
        """Leases that take a slot, to be read only; instances without are not listed."""
        self._gone: set[InstanceId] = set()
        """Instances that are off the books while requests to them still end: of those nothing more is noted."""

    def of(self, instance: InstanceId) -> Collection[Lease]:
        """Those on one instance."""
        return self._leases.get(instance, ())

    def all(self) -> frozenset[Lease]:
        """Every one of them."""
        return frozenset(lease for held in self._leases.values() for lease in held)

    def add(self, lease: Lease) -> None:
        """It is held from now on."""
        instance = lease.host.instance
        held = self._leases.get(instance) or self._leases.setdefault(instance, set())
        if len(held) == 1:  # with more, all of them know already
            next(iter(held)).crowded = True
        lease.crowded = bool(held)
        held.add(lease)
        if not lease.beside:
            self.counts[instance] = self.counts.get(instance, 0) + 1

    def remove(self, lease: Lease) -> bool:
        """It is held no longer. Whether its instance is on the books still."""
        instance = lease.host.instance
        held = self._leases.get(instance)
        on_the_books = instance not in self._gone
        if held is None or lease not in held:
            return on_the_books
        held.remove(lease)
        if not lease.beside:
            self._count_down(instance)
        if not held:
            del self._leases[instance]
            if not on_the_books:
                self._gone.remove(instance)
                self._forgotten(instance)
        return on_the_books

    def swap(self, one: Lease, other: Lease) -> None:
        """Change the instances of two leases that are both held: what was the one's is the other's now, its end included."""
        for each in (one, other):
            self._leases[each.host.instance].discard(each)
        for name in ("host", "future", "died", "crowded"):
            mine, its = getattr(one, name), getattr(other, name)
            setattr(one, name, its)
            setattr(other, name, mine)
        for each in (one, other):
            self._leases[each.host.instance].add(each)

    def forget(self, instance: InstanceId) -> None:
        """It is off the books, as soon as nobody holds it."""
        if instance in self._leases:
            self._gone.add(instance)

    def _count_down(self, instance: InstanceId) -> None:
        count = self.counts[instance] - 1
        if count:
            self.counts[instance] = count
        else:
            del self.counts[instance]
