"""Finds what real engines were recorded to say, which lies beside the project where there is a copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).resolve()


def shared(path: str) -> Path:
    """A file or folder of the shared facts about engines; a skipped test where there is none."""
    for folder in _HERE.parents:
        found = folder / "shared" / "backends" / path
        if found.exists():
            return found
    pytest.skip(f"no shared/backends/{path} beside the project")
