from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.units import Instant
from tests.fakes.nvml import fake


class HeldClock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> Instant:
        return Instant(self.at)

    def wall(self) -> float:
        return self.at


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fake.FakeNvml:
    """Two cards of 24 GiB behind the real nvidia-ml-py."""
    return fake.use(monkeypatch, tmp_path, gpus=2)
