"""What each process tree holds of each device, the most it ever held, and what has not come back after its end."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping

from offloadd.observe.devices import held_by
from offloadd.observe.processes import own_memory, program_name, read_children, tree
from offloadd.state.ids import HOST_RAM, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView, ForeignProcess, InstanceState, InstanceView
from offloadd.units import Bytes

MAX_FOREIGN = 20
RETURNED = 0.75
"""The part of an ended tree's memory that must be free again: drivers keep a little for themselves."""

Sizes = Mapping[DeviceId, Bytes]


class Holdings:
    """Measurements by owner: an instance or a loan."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Sizes] = {}
        self._peaks: dict[Hashable, dict[DeviceId, Bytes]] = {}
        self._last: dict[Hashable, Sizes] = {}
        self._free_then: dict[Hashable, Sizes] = {}
        self._free_now: Sizes = {}
        self.foreign: dict[DeviceId, tuple[ForeignProcess, ...]] = {}

    def measure(self, pids: Mapping[Hashable, int], devices: Mapping[DeviceId, DeviceView]) -> None:
        """Measure every owner's tree. Blocks. What was last seen of owners that are not in `pids` any more is kept."""
        children = read_children() if pids else {}
        trees = {owner: tree(pid, children) for owner, pid in pids.items()}
        fresh = {owner: _held(found, devices) for owner, found in trees.items()}
        ours = {pid for found in trees.values() for pid in found}
        self.foreign = {view.id: _foreign(view, ours) for view in devices.values() if view.processes}
        self._free_now = {device: view.free for device, view in devices.items()}
        for owner, sizes in fresh.items():
            peaks = self._peaks.setdefault(owner, {})
            peaks.update({device: max(size, peaks.get(device, size)) for device, size in sizes.items()})
            self._last[owner], self._free_then[owner] = sizes, self._free_now
        self._held = dict(fresh)

    def forget(self, kept: Container[Hashable]) -> None:
        """Drop owners that are not on the books any more."""
        for book in (self._peaks, self._last, self._free_then):
            for owner in [owner for owner in book if owner not in kept]:
                del book[owner]

    def of(self, owner: Hashable) -> Sizes:
        """What it holds now; a device that is absent was not measured."""
        return self._held.get(owner, {})

    def peak_of(self, owner: Hashable) -> Sizes:
        """The most it was ever seen to hold."""
        return self._peaks.get(owner, {})

    def unreleased(self, view: InstanceView) -> Sizes:
        """GPU memory of an ended instance that its devices do not show as free yet.

        Judged by how much more is free now than when it was last measured alive: others may come and go meanwhile, so the planner
        does not wait for this for ever.
        """
        if view.state is not InstanceState.EXITED:
            return {}
        last, then = self._last.get(view.id, {}), self._free_then.get(view.id, {})
        missing: dict[DeviceId, Bytes] = {}
        for device, size in last.items():
            back = self._free_now.get(device, Bytes(0)) - then.get(device, Bytes(0))
            if device != HOST_RAM and back < size * RETURNED:
                missing[device] = Bytes(size - max(0, back))
        return missing


def _foreign(view: DeviceView, ours: set[int]) -> tuple[ForeignProcess, ...]:
    others = [(size, pid) for pid, size in (view.processes or {}).items() if pid not in ours]
    others.sort(key=lambda entry: (-(entry[0] or 0), entry[1]))
    return tuple(ForeignProcess(pid=pid, name=program_name(pid), size=size) for size, pid in others[:MAX_FOREIGN])


def _held(pids: list[int], devices: Mapping[DeviceId, DeviceView]) -> Sizes:
    sizes = {view.id: held_by(view, pids) for view in devices.values() if view.kind is not DeviceKind.HOST}
    sizes[HOST_RAM] = own_memory(pids)
    return {device: size for device, size in sizes.items() if size is not None}
