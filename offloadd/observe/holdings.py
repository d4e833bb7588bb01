"""What each process tree holds of each device, the most it ever held, and what has not come back after its end."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from offloadd.observe.devices import held_by
from offloadd.observe.processes import own_memory, program_name, read_children, tree
from offloadd.state.ids import HOST_RAM, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView, ForeignProcess, InstanceState, InstanceView
from offloadd.units import Bytes

MAX_FOREIGN = 20
RETURNED = 0.75
"""The part of an ended tree's memory that must be free again: drivers keep a little for themselves."""

Sizes = Mapping[DeviceId, Bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One look at every owner's tree, and the devices' readings that it belongs to."""

    held: Mapping[Hashable, Sizes]
    trees: Mapping[Hashable, list[int]]
    foreign: Mapping[DeviceId, tuple[ForeignProcess, ...]]
    devices: Mapping[DeviceId, DeviceView]


def measure(pids: Mapping[Hashable, int], devices: Mapping[DeviceId, DeviceView]) -> Measured:
    """Measure every owner's tree, given its leader. Blocks."""
    children = read_children() if pids else {}
    trees = {owner: tree(pid, children) for owner, pid in pids.items()}
    ours = {pid for found in trees.values() for pid in found}
    return Measured(
        held={owner: _held(found, devices) for owner, found in trees.items()},
        trees=trees,
        foreign={view.id: _foreign(view, ours) for view in devices.values() if view.processes},
        devices=devices,
    )


class Holdings:
    """Measurements by owner: an instance or a loan."""

    def __init__(self) -> None:
        self._held: Mapping[Hashable, Sizes] = {}
        self._peaks: dict[Hashable, dict[DeviceId, Bytes]] = {}
        self._last: dict[Hashable, Sizes] = {}
        self._free_then: dict[Hashable, Sizes] = {}
        self._free_now: Sizes = {}
        self._trees: dict[Hashable, list[int]] = {}
        self._unlisted_then: dict[Hashable, Sizes] = {}
        self._devices: Mapping[DeviceId, DeviceView] = {}
        self.foreign: Mapping[DeviceId, tuple[ForeignProcess, ...]] = {}

    def keep(self, seen: Measured) -> None:
        """Take over a look, the devices' readings with it. What was last seen of owners that are not in it any more is kept."""
        self._devices = seen.devices
        self._free_now = {device: view.free for device, view in seen.devices.items()}
        unlisted = {device: size for device, view in seen.devices.items() if (size := _unlisted(view)) is not None}
        for owner, sizes in seen.held.items():
            peaks = self._peaks.setdefault(owner, {})
            peaks.update({device: max(size, peaks.get(device, size)) for device, size in sizes.items()})
            # One that holds nothing now may be in the middle of its end, or its devices could not be read.
            if owner not in self._last or any(size for device, size in sizes.items() if device != HOST_RAM):
                self._last[owner], self._trees[owner] = sizes, seen.trees[owner]
                self._free_then[owner], self._unlisted_then[owner] = self._free_now, unlisted
        self._held, self.foreign = seen.held, seen.foreign

    def forget(self, kept: Container[Hashable]) -> None:
        """Drop owners that are not on the books any more."""
        books: tuple[dict[Hashable, Any], ...] = (self._peaks, self._last, self._free_then, self._trees, self._unlisted_then)
        for book in books:
            for owner in [owner for owner in book if owner not in kept]:
                del book[owner]

    def of(self, owner: Hashable) -> Sizes:
        """What it holds now; a device that is absent was not measured."""
        return self._held.get(owner, {})

    def peak_of(self, owner: Hashable) -> Sizes:
        """The most it was ever seen to hold."""
        return self._peaks.get(owner, {})

    def unreleased(self, view: InstanceView) -> Sizes:
        """GPU memory of an ended instance that its devices do not show as free yet; all of it where they cannot be read."""
        if view.state is not InstanceState.EXITED:
            return {}
        missing: dict[DeviceId, Bytes] = {}
        for device, size in self._last.get(view.id, {}).items():
            taken = min(size, self._still_taken(view.id, device, size))
            if device != HOST_RAM and taken > size * (1 - RETURNED):
                missing[device] = Bytes(taken)
        return missing

    def _still_taken(self, owner: Hashable, device: DeviceId, size: Bytes) -> int:
        """What the device still lists the tree with, and by how much more of it nobody is listed with than when the tree lived.

        Where that is not known, what is free must tell; then others who come or go meanwhile are taken for it, so the planner does
        not wait for this for ever.
        """
        view = self._devices.get(device)
        before, now = self._unlisted_then.get(owner, {}).get(device), _unlisted(view) if view else None
        if view is None or before is None or now is None:
            return size - (self._free_now.get(device, Bytes(0)) - self._free_then.get(owner, {}).get(device, Bytes(0)))
        return now - before + (held_by(view, self._trees[owner]) or 0)


def _unlisted(view: DeviceView) -> Bytes | None:
    """Bytes in use that no process is listed with; None where that cannot be told."""
    sizes = None if view.processes is None or view.unified else list(view.processes.values())
    if sizes is None or None in sizes:
        return None
    return Bytes(view.used - sum(size or 0 for size in sizes))


def _foreign(view: DeviceView, ours: set[int]) -> tuple[ForeignProcess, ...]:
    others = [(size, pid) for pid, size in (view.processes or {}).items() if pid not in ours]
    others.sort(key=lambda entry: (-(entry[0] or 0), entry[1]))
    return tuple(ForeignProcess(pid=pid, name=program_name(pid), size=size) for size, pid in others[:MAX_FOREIGN])


def _held(pids: list[int], devices: Mapping[DeviceId, DeviceView]) -> Sizes:
    sizes = {view.id: held_by(view, pids) for view in devices.values() if view.kind is not DeviceKind.HOST}
    sizes[HOST_RAM] = own_memory(pids)
    return {device: size for device, size in sizes.items() if size is not None}
