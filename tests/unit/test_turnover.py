"""Another config, or other files: what they name is looked at before it is served, and what is gone is forgotten by everybody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from offloadd.errors import PermanentError
from offloadd.state.desired import DesiredState
from offloadd.turnover import Turnover
from tests.fakes.parts import Part

FORGET = ["hosts.changed", "executor.forget_models", "book.forget_models", "wake"]


def turnover(told: list[str], files: asyncio.Event, *, refused: str = "") -> Turnover:
    def check(_: object) -> None:
        if refused:
            raise PermanentError(refused)

    catalog = Part("catalog", told, "prepare")
    catalog.desired = DesiredState()
    parts: dict[str, Any] = {name: Part(name, told) for name in ("hosts", "executor", "book", "wishes")}
    return Turnover(
        catalog=catalog,
        observer=Part("observer", told, "consider"),
        rounds=Part("rounds", told, "look_ahead"),
        config=DesiredState,
        other_files=files,
        listeners=lambda: Part("listeners", told, check=check),
        wake=lambda: told.append("wake"),
        **parts,
    )


async def test_a_config_is_looked_at_before_it_is_taken() -> None:
    told: list[str] = []
    await turnover(told, asyncio.Event()).before_config(DesiredState())
    assert told == ["listeners.check", "rounds.look_ahead"]


async def test_one_that_does_not_suit_our_sockets_is_refused_unlooked_at() -> None:
    told: list[str] = []
    with pytest.raises(PermanentError, match="no keys"):
        await turnover(told, asyncio.Event(), refused="there are no keys").before_config(DesiredState())
    assert told == ["listeners.check"]


async def test_a_config_in_force_has_the_last_word() -> None:
    told: list[str] = []
    turnover(told, asyncio.Event()).after_config()
    assert told == ["catalog.reloaded", "rounds.look_soon", "wishes.yield_to_config", *FORGET]


async def test_files_are_served_once_it_is_known_what_they_need() -> None:
    told: list[str] = []
    files = asyncio.Event()
    step = asyncio.create_task(turnover(told, files).follow_files())
    await asyncio.sleep(0)
    assert told == []
    files.set()
    await step
    assert told == ["catalog.prepare", "observer.consider", "catalog.publish", *FORGET]
    assert not files.is_set()
