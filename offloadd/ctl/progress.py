"""While an answer is waited for: the planner's sentence about the model, on a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import quote

import aiohttp

from offloadd.client import Server
from offloadd.ctl.show import aside
from offloadd.errors import OffloaddError

_EVERY_S = 1.0


@asynccontextmanager
async def told_why(server: Server, session: aiohttp.ClientSession, model: str) -> AsyncIterator[asyncio.Task[None] | None]:
    """Show why it waits until the block ends or the task that it gives is cancelled; nothing where nobody looks."""
    if not aside.is_terminal:
        yield None
        return
    task = asyncio.create_task(_tell(server, session, model))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _tell(server: Server, session: aiohttp.ClientSession, model: str) -> None:
    await asyncio.sleep(_EVERY_S)
    with aside.status(f"{model} …") as status:
        while True:
            with suppress(OffloaddError):
                _, answer = await server.ask(session, "GET", model_path(model))
                own = answer["offloadd"]
                status.update(f"{model} is {own['state']}: {own['reason']}")
            await asyncio.sleep(_EVERY_S)


def model_path(name: str, rest: str = "") -> str:
    """`/models/{name}`; an alias may hold a slash, which the route takes as it is."""
    return f"/models/{quote(name, safe='/:@')}{rest}"
