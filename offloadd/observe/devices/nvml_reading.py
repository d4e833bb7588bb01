"""One pass over NVIDIA's cards in an open session: what was read, and what failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from offloadd.observe.devices import nvml_calls as calls
from offloadd.observe.devices.nvml_calls import Handle, Nvml, NvmlError
from offloadd.observe.devices.ram import Ram
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes


class Reading:
    """One pass over the cards of an open session. NvmlError out of it means that the session is lost."""

    def __init__(self, nvml: Nvml, machine: Callable[[], Ram]) -> None:
        self._nvml = nvml
        self._machine = machine
        self.views: list[DeviceView] = []
        self.uuids: dict[int, str] = {}
        """Of cards by index, working or not."""
        self.names: dict[str, str] = {}
        """Of cards and slices by UUID."""
        self.unopened: dict[int, NvmlError] = {}
        """By index, cards of which not even the UUID could be read."""
        self.failures: dict[str, tuple[int, NvmlError]] = {}
        """By UUID, cards and slices that were left out: the card's index, and why."""

    def take(self) -> None:
        """Read all; a card's failure stays its own."""
        for index in range(self._nvml.count()):
            try:
                self._card(index)
            except NvmlError as error:
                if error.code in calls.SESSION_LOST:
                    raise
                self._fail(index, error)

    def errors(self) -> Iterator[NvmlError]:
        """Why cards and slices were left out."""
        yield from self.unopened.values()
        yield from (error for _, error in self.failures.values())

    def _fail(self, index: int, error: NvmlError) -> None:
        uuid = self.uuids.get(index)
        if uuid is None:
            self.unopened[index] = error
        else:
            self.failures[uuid] = (index, error)

    def _card(self, index: int) -> None:
        handle = self._nvml.card(index)
        uuid = self.uuids[index] = self._nvml.uuid(handle)
        self.names[uuid] = self._nvml.name(handle) or "NVIDIA GPU"
        if self._nvml.is_sliced(handle):
            self.views.extend(self._slices(index, handle, uuid))
        else:
            self.views.append(self._view(handle, uuid, index))

    def _slices(self, index: int, handle: Handle, card: str) -> list[DeviceView]:
        found = list(self._nvml.slices(handle))
        if not found:
            raise NvmlError(calls.NOT_FOUND, "MIG mode is on and there are no MIG devices on it")
        views = []
        for each in found:
            uuid = self._nvml.uuid(each)
            self.names[uuid] = self._nvml.name(each) or f"{self.names[card]} MIG"
            try:
                views.append(self._view(each, uuid, index, slice_of=card))
            except NvmlError as error:
                if error.code in calls.SESSION_LOST | calls.CARD_LOST:
                    raise
                self.failures[uuid] = (index, error)
        return views

    def _view(self, handle: Handle, uuid: str, index: int, *, slice_of: str = "") -> DeviceView:
        memory = self._memory(handle, may_share=not slice_of)
        processes, problem = self._processes(handle)
        return DeviceView(
            id=DeviceId(LOCAL, uuid),
            kind=DeviceKind.NVIDIA,
            name=self.names[uuid],
            index=index,
            total=Bytes(memory.total),
            free=Bytes(min(memory.free, memory.total)),
            utilization=None if slice_of else self._nvml.utilization(handle),
            temperature=self._nvml.temperature(handle),
            power_w=self._nvml.power_w(handle),
            processes=processes,
            unified=memory.is_shared,
            slice_of=slice_of,
            problem=problem,
        )

    def _memory(self, handle: Handle, *, may_share: bool) -> _Memory:
        """A card without memory information is one that uses the machine's RAM; a slice without it cannot be used."""
        try:
            own = self._nvml.memory(handle)
        except NvmlError as error:
            if error.code != calls.NOT_SUPPORTED or not may_share:
                raise
            ram = self._machine()
            return _Memory(ram.total, ram.free, is_shared=True)
        if own.total <= 0:
            raise NvmlError(calls.UNKNOWN, "it says that it has no memory")
        return _Memory(own.total, own.free, is_shared=False)

    def _processes(self, handle: Handle) -> tuple[dict[int, Bytes | None] | None, str]:
        """Both lists as one, a process in both counting once; or None, and why."""
        try:
            found = self._nvml.compute_processes(handle)
        except NvmlError as error:
            if error.code in calls.SESSION_LOST | calls.CARD_LOST:
                raise
            return None, f"what each process holds is not known: {error.message}"
        # Nothing of ours draws: where this list is missing, what drawing takes is still in the card's own figures.
        drawing = self._nvml.maybe(lambda: self._nvml.graphics_processes(handle)) or {}
        both = {pid: calls.larger(found.get(pid), drawing.get(pid)) for pid in found.keys() | drawing.keys()}
        return {pid: None if size is None else Bytes(size) for pid, size in sorted(both.items())}, ""


@dataclass(frozen=True, slots=True)
class _Memory:
    total: int
    free: int
    is_shared: bool
