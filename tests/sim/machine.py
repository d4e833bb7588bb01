"""The memory of a simulated machine: RAM and GPUs, who holds what of them, and what a reading shows of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes

GIB = 2**30
RETURNED = 0.75
"""The part of an ended process's memory that must be seen to be back, as in the observer."""


@dataclass(slots=True, kw_only=True, eq=False)
class Card:
    """One device: RAM, a GPU, or a slice of one. A unified GPU has no memory but the machine's RAM."""

    id: DeviceId
    total: int
    index: int = 0
    unified: bool = False
    slice_of: str = ""
    foreign: int = 0
    """What programs that are not ours use of it."""
    ghosts: int = 0
    """Memory of ended processes that it still reports as used."""
    lost: bool = False
    """Its reading fails; whatever runs on it runs on."""
    robbed: bool = False
    """Others took memory here that was promised to us and not taken yet."""

    @property
    def is_gpu(self) -> bool:
        return self.id != HOST_RAM


def gpu(index: int, size: float, *, slice_of: str = "", part: int = 0, unified: bool = False) -> Card:
    """A GPU of so many GiB; a slice has its card's index and a number of its own."""
    name = f"MIG-{index}-{part}" if slice_of else f"GPU-{index}"
    return Card(id=DeviceId(LOCAL, name), total=int(size * GIB), index=index, slice_of=slice_of, unified=unified)


class Machine:
    """What is true of the memory. Sizes are bytes; owners are instances and loans."""

    def __init__(self, ram: int, gpus: Sequence[Card] = ()) -> None:
        self.cards = {card.id: card for card in (Card(id=HOST_RAM, total=ram), *gpus)}
        self.held: dict[Hashable, dict[DeviceId, int]] = {}
        self.driver_lost = False
        """No GPU can be read."""
        self.tells_sizes = True
        """Whether the driver says how much each process holds; else only what is free tells whether memory came back."""
        self._last: dict[Hashable, dict[DeviceId, tuple[int, int]]] = {}

    @property
    def gpus(self) -> list[Card]:
        return [card for card in self.cards.values() if card.is_gpu]

    def pool(self, device: DeviceId) -> list[Card]:
        """The devices that are one memory with this one, itself included."""
        shared = [card for card in self.cards.values() if card.unified or not card.is_gpu]
        one = self.cards[device]
        return shared if one in shared else [one]

    def held_by(self, owner: Hashable, device: DeviceId) -> int:
        return self.held.get(owner, {}).get(device, 0)

    def balance(self, device: DeviceId) -> int:
        """What is free; below zero when more is used than there is."""
        pool = self.pool(device)
        taken = sum(sizes.get(card.id, 0) for sizes in self.held.values() for card in pool)
        return self.cards[device].total - sum(card.foreign + card.ghosts for card in pool) - taken

    def free(self, device: DeviceId) -> int:
        return max(0, self.balance(device))

    def take(self, owner: Hashable, sizes: Mapping[DeviceId, int]) -> None:
        """The owner holds at least this much from now on."""
        held = self.held.setdefault(owner, {})
        for device, size in sizes.items():
            held[device] = max(size, held.get(device, 0))

    def shrink(self, owner: Hashable, sizes: Mapping[DeviceId, int]) -> dict[DeviceId, int]:
        """The owner keeps no more than this of these devices; the rest stays used until it `came_back`."""
        held = self.held.get(owner, {})
        freed = {device: max(0, held.get(device, 0) - size) for device, size in sizes.items()}
        for device, size in freed.items():
            held[device] = held.get(device, 0) - size
            self.cards[device].ghosts += size
        return freed

    def drop(self, owner: Hashable) -> dict[DeviceId, int]:
        """The owner is gone; what it held stays used until it `came_back`."""
        sizes = self.held.pop(owner, {})
        for device, size in sizes.items():
            self.cards[device].ghosts += size
        return sizes

    def came_back(self, sizes: Mapping[DeviceId, int]) -> None:
        for device, size in sizes.items():
            self.cards[device].ghosts -= size

    # What a daemon reads

    @property
    def blind(self) -> str:
        """Why no GPU can be read, though there are some."""
        lost = self.driver_lost or all(card.lost for card in self.gpus)
        return "the driver does not answer" if self.gpus and lost else ""

    def seen(self) -> Iterator[Card]:
        """Devices whose reading succeeds."""
        for card in self.cards.values():
            if not card.lost and not (card.is_gpu and self.driver_lost):
                yield card

    def views(self) -> dict[DeviceId, DeviceView]:
        return {card.id: self._view(card) for card in self.seen()}

    def _view(self, card: Card) -> DeviceView:
        return DeviceView(
            id=card.id,
            kind=DeviceKind.NVIDIA if card.is_gpu else DeviceKind.HOST,
            name=card.id.name,
            total=Bytes(card.total),
            free=Bytes(self.free(card.id)),
            index=card.index,
            unified=card.unified,
            slice_of=card.slice_of,
        )

    def read(self, owners: Iterable[Hashable]) -> None:
        """Measure who holds what, as the observer does; `owners` are those whose last measurement is still of use."""
        seen = list(self.seen())
        kept = {*self.held, *owners}
        self._last = {owner: sizes for owner, sizes in self._last.items() if owner in kept}
        for owner, sizes in self.held.items():
            self._last[owner] = {card.id: (sizes.get(card.id, 0), self._mark(card)) for card in seen}

    def measured(self, owner: Hashable) -> dict[DeviceId, Bytes]:
        """What it was just seen to hold, by device that can be read."""
        if owner not in self.held:
            return {}
        return {device: Bytes(size) for device, (size, _) in self._last.get(owner, {}).items()}

    def unreleased(self, owner: Hashable) -> dict[DeviceId, Bytes]:
        """What GPUs do not show as free since an owner ended, or cannot show because they are not read."""
        seen = {card.id for card in self.seen()}
        missing: dict[DeviceId, Bytes] = {}
        for device, (size, mark) in self._last.get(owner, {}).items():
            change = self._mark(self.cards[device]) - mark
            kept = size if device not in seen else min(size, change if self.tells_sizes else size - change)
            if self.cards[device].is_gpu and kept > size * (1 - RETURNED):
                missing[device] = Bytes(kept)
        return missing

    def _mark(self, card: Card) -> int:
        """What tells that memory came back: bytes used by nobody who is listed, or bytes free where nobody's size is told."""
        return card.ghosts if self.tells_sizes else self.free(card.id)
