"""AMD's cards, from what the kernel driver amdgpu writes into sysfs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from offloadd.observe.devices.fdinfo import Uses, read_uses
from offloadd.observe.devices.ram import Ram, read_ram
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes

DRM = Path("/sys/class/drm")
PROC = Path("/proc")

_CARD = re.compile(r"card([0-9]+)")
_CARVE_OUT = 2 * 2**30
"""Less VRAM than this is a processor's carve-out beside its real memory, GTT. No card that runs a model has so little.

A processor with a larger one is taken for a card: that understates it, and never promises what isn't there.
"""


class AmdReader:
    """AMD's devices, by card number. Where amdgpu isn't loaded there are none, without a word."""

    name = "amd"

    def __init__(self, *, drm: Path = DRM, proc: Path = PROC, machine: Callable[[], Ram] = read_ram) -> None:
        self._drm = drm
        self._proc = proc
        self._machine = machine
        self._known: dict[str, str] = {}
        """The id of each PCI address ever read, so that a card which is gone can be called by its name."""
        self._problems: Mapping[str, str] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """Cards that were left out and why, by their ids."""
        return self._problems

    def read(self) -> Sequence[DeviceView]:
        """Cards by number, which may have gaps; raise OSError when the list of cards can't be read."""
        views: list[DeviceView] = []
        problems: dict[str, str] = {}
        cards = self._cards()
        uses = read_uses(self._proc, driver="amdgpu") if cards else {}
        for index, folder in enumerate(cards):
            address = folder.resolve().name
            name = _identity(folder, address, taken={view.id.name for view in views})
            self._known[address] = name
            try:
                views.append(self._view(folder, name, index, uses.get(address, {})))
            except (OSError, ValueError) as error:
                problems[name] = f"AMD GPU at {address} can't be read: {error}"
        present = {folder.resolve().name for folder in cards}
        for address, name in self._known.items():
            if address not in present:
                problems[name] = f"AMD GPU at {address} is no longer there"
        self._problems = problems
        return tuple(views)

    def _cards(self) -> list[Path]:
        """The device folders of amdgpu's cards, by card number; connectors are in the same place."""
        try:
            names = [entry.name for entry in self._drm.iterdir()]
        except FileNotFoundError:
            return []
        numbers = sorted(int(match[1]) for match in map(_CARD.fullmatch, names) if match)
        folders = [self._drm / f"card{number}" / "device" for number in numbers]
        return [folder for folder in folders if (folder / "mem_info_vram_total").exists()]

    def _view(self, folder: Path, name: str, index: int, processes: Uses) -> DeviceView:
        memory, unified = self._memory(folder)
        busy = _gauge(folder / "gpu_busy_percent")
        monitor = _monitor(folder)
        power = _gauge(monitor / "power1_average")
        power = _gauge(monitor / "power1_input") if power is None else power
        temperature = _gauge(monitor / "temp1_input")
        return DeviceView(
            id=DeviceId(LOCAL, name),
            kind=DeviceKind.AMD,
            name=_product(folder),
            index=index,
            total=Bytes(memory.total),
            free=Bytes(memory.free),
            utilization=None if busy is None else min(100, busy) / 100,
            temperature=None if temperature is None else temperature / 1000,
            power_w=None if power is None else power / 1e6,
            processes=processes,
            unified=unified,
        )

    def _memory(self, folder: Path) -> tuple[Ram, bool]:
        """VRAM; of a processor's graphics VRAM and GTT, as far as the machine has that much to give, and True."""
        vram = _pool(folder, "vram")
        if vram.total >= _CARVE_OUT or not (folder / "mem_info_gtt_total").exists():
            return vram, False
        gtt = _pool(folder, "gtt")
        shared = min(gtt.free, self._machine().free)
        return Ram(vram.total + gtt.total, vram.free + shared), True


def _pool(folder: Path, kind: str) -> Ram:
    total = _required(folder / f"mem_info_{kind}_total")
    used = _required(folder / f"mem_info_{kind}_used")
    if total == 0:
        raise ValueError(f"it says that it has no {kind.upper()}")
    return Ram(total, max(0, total - used))


def _required(file: Path) -> int:
    text = file.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{file.name} holds {text[:40]!r}, which is not a number of bytes")
    return int(text)


def _identity(folder: Path, address: str, taken: set[str]) -> str:
    """`GPU-` and the chip's own number, as ROCR_VISIBLE_DEVICES takes it, else the PCI address."""
    unique = _text(folder / "unique_id").lower().removeprefix("0x")
    name = f"GPU-{unique}"
    return name if unique.strip("0") and name not in taken else f"pci-{address}"


def _product(folder: Path) -> str:
    return _text(folder / "product_name") or "AMD GPU"


def _monitor(folder: Path) -> Path:
    """Its hwmon folder, whose number changes from boot to boot."""
    return min(folder.glob("hwmon/hwmon*"), default=folder / "hwmon")


def _gauge(file: Path) -> int | None:
    """A number that one can do without; a card that sleeps refuses it."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
