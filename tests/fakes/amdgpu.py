"""A tree like that of a machine with AMD's cards: sysfs as the kernel driver amdgpu fills it, and /proc with its clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class FakeCard:
    """Where one card's files are."""

    folder: Path
    address: str

    def put(self, **files: object) -> None:
        """Write files of the device folder; a value of None takes the file away."""
        for name, value in files.items():
            _put(self.folder / name, value)

    def gauge(self, **files: object) -> None:
        """Write files of its hwmon folder."""
        for name, value in files.items():
            _put(self.folder / "hwmon" / "hwmon3" / name, value)


class FakeAmd:
    """`drm` and `proc` are the roots to give to the reader."""

    def __init__(self, root: Path) -> None:
        self.drm = root / "class" / "drm"
        self.proc = root / "proc"
        self._devices = root / "devices"
        for folder in (self.drm, self.proc, self._devices):
            folder.mkdir(parents=True)

    def card(self, number: int, address: str, *, total: int = 16 * GIB, used: int = GIB, unique_id: str | None = None) -> FakeCard:
        """Add a card, with a connector beside it as the kernel makes them."""
        folder = self._devices / address
        (folder / "hwmon" / "hwmon3").mkdir(parents=True)
        (self.drm / f"card{number}").mkdir()
        (self.drm / f"card{number}-DP-1").mkdir()
        (self.drm / f"card{number}" / "device").symlink_to(folder)
        card = FakeCard(folder, address)
        card.put(mem_info_vram_total=total, mem_info_vram_used=used, gpu_busy_percent=37, unique_id=unique_id)
        card.gauge(temp1_input=51_000, power1_average=120_500_000)
        return card

    def remove(self, number: int) -> None:
        """Take a card off the bus."""
        (self.drm / f"card{number}" / "device").unlink()
        (self.drm / f"card{number}").rmdir()

    def descriptor(self, pid: int, number: int, facts: dict[str, str], *, path: str = "/dev/dri/renderD128") -> None:
        """Let a process have a descriptor open."""
        process = self.proc / str(pid)
        for folder in (process / "fd", process / "fdinfo"):
            folder.mkdir(parents=True, exist_ok=True)
        (process / "fd" / str(number)).symlink_to(path)
        (process / "fdinfo" / str(number)).write_text(
            "pos:\t0\nflags:\t02100002\n" + "".join(f"{k}:\t{v}\n" for k, v in facts.items())
        )


def client(address: str, number: int, **facts: str) -> dict[str, str]:
    """What the driver writes for one client; `_` in the names of `facts` stands for `-`."""
    own = {"drm-driver": "amdgpu", "drm-pdev": address, "drm-client-id": str(number)}
    return own | {key.replace("_", "-"): value for key, value in facts.items()}


def _put(file: Path, value: object) -> None:
    if value is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(f"{value}\n")
