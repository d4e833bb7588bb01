"""`offloadctl logs` and `offloadctl events`: what is told while it happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import aiohttp
import typer
from rich.text import Text

from offloadd.client import Server, lines, query
from offloadd.ctl.app import ModelArgument, app
from offloadd.ctl.progress import model_path
from offloadd.ctl.show import aside, console
from offloadd.errors import OffloaddError
from offloadd.terminal import JsonOption

_AGAIN_S = 1.0
_LEVELS = {"warning": "yellow", "error": "red", "critical": "bold red"}


@app.command()
def logs(
    context: typer.Context,
    model: ModelArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it writes, and with the model's next launches.")] = False,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="How many of its last lines come first.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Output of a model's server: of its latest launch, or of one instance when its name is given (llama-3)."""
    asyncio.run(_logs(context.obj, model, follow=follow, count=count, as_json=as_json))


async def _logs(server: Server, name: str, *, follow: bool, count: int, as_json: bool) -> None:
    async with server.session() as session:
        seen = await _print_log(server, session, name, count, follow=follow, as_json=as_json)
        while follow and seen != name:  # a model, not one of its instances: its next launch is of interest too
            aside.print(f"— {seen} has ended; waiting for the next launch of {name}, Ctrl-C ends this", style="dim", markup=False)
            latest = await _next_launch(server, session, name, seen)
            seen = await _print_log(server, session, latest, 100_000, follow=True, as_json=as_json)


async def _print_log(server: Server, session: aiohttp.ClientSession, name: str, count: int, *, follow: bool, as_json: bool) -> str:
    """Print one instance's output to its end; the name of the instance."""
    path = f"/logs/{quote(name, safe='/:@')}" + query(lines=count, follow=1 if follow else None)
    async with server.open(session, "GET", path) as answer:
        instance = answer.headers.get("X-Offloadd-Instance", name)
        async for line in lines(answer):
            print(json.dumps({"instance": instance, "line": line}) if as_json else line, flush=follow)
    return instance


async def _next_launch(server: Server, session: aiohttp.ClientSession, model: str, seen: str) -> str:
    """The model's youngest instance, once it is another one than what was `seen`."""
    while True:
        _, answer = await server.ask(session, "GET", model_path(model))
        found = sorted((each["started_at"], each["instance"]) for each in answer["offloadd"]["instances"])
        if found and found[-1][1] != seen:
            return str(found[-1][1])
        await asyncio.sleep(_AGAIN_S)


@app.command()
def events(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Only what is about this model.")] = "",
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of event, such as instance-ready; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Changes of state, as they happen: one line each, until Ctrl-C."""
    asyncio.run(_events(context.obj, model, frozenset(kind or ()), as_json=as_json))


async def _events(server: Server, model: str, kinds: frozenset[str], *, as_json: bool) -> None:
    async with server.session() as session:
        lost = True
        while lost:
            lost = False
            async for kind, data in server.events(session, "GET", f"/events{query(model=model or None)}"):
                lost = kind == "lost"
                if kinds and kind not in kinds and not lost:
                    continue
                if as_json:
                    print(data, flush=True)
                else:
                    console.print(event_line(json.loads(data)))
    raise OffloaddError("the daemon ended")


def event_line(event: Mapping[str, Any]) -> Text:
    """Time, kind and sentence of one event."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.get("at", time.time())))
    style = _LEVELS.get(str(event.get("level", "")), "")
    return Text(f"{clock} ", "dim") + Text(f"{event.get('kind', '')} ", "cyan") + Text(str(event.get("message", "")), style)
