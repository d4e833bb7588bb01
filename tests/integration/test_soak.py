"""The house of `make soak`, for a short while."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.soak.soak import check, soak

SECONDS = float(os.environ.get("OFFLOADD_SOAK_S", "12"))


@pytest.mark.timeout(SECONDS + 300)
def test_everything_adds_up_after_a_rough_while(tmp_path: Path) -> None:
    seed = int(os.environ.get("OFFLOADD_SEED", "0")) or random.randrange(10**6)
    print(f"OFFLOADD_SEED={seed}")
    figures = soak(tmp_path, SECONDS, seed)
    print("\n".join(figures.lines()))
    check(figures)
    assert figures.sent > 50
    assert figures.kills > 1
    assert figures.reloads > 1
