"""Both kinds of registry for the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.registry.database import Place
from tests import postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    with postgres.server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A registry that is not there yet."""
    if request.param == "sqlite":
        return Place(file=tmp_path / "registry.db")
    return Place(url=request.getfixturevalue("postgres_server").new_database())
