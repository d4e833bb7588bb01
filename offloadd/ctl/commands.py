"""Commands that ask once and show the answer: status, models, backends, vram, load, unload, explain, reload."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from offloadd.client import Server, query
from offloadd.ctl import show
from offloadd.ctl.app import ModelArgument, app
from offloadd.ctl.progress import model_path, told_why
from offloadd.ctl.show import console, print_json
from offloadd.terminal import FAILED, JsonOption
from offloadd.units import format_seconds


@app.command()
def status(context: typer.Context, as_json: JsonOption = False) -> None:
    """Health, models and memory in one view. Exit 1 when the daemon is not well."""
    server: Server = context.obj
    health, models, vram = server.get("/health"), server.get("/models"), server.get("/vram/status")
    if as_json:
        print_json({"health": health, "models": models["data"], "vram": vram})
    else:
        up, generation = format_seconds(health["uptime_s"]), health["generation"]
        console.print(f"offloadd {health['version']} is {health['status']}, up {up}, config generation {generation}")
        for problem in health["problems"]:
            console.print(f"  problem: {problem['what']}", style="yellow", markup=False)
            if problem["hint"]:
                console.print(f"           {problem['hint']}", markup=False)
        console.print(show.models_table(models))
        console.print(show.vram_table(vram))
    if health["status"] != "ok":
        raise typer.Exit(FAILED)


@app.command()
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """Every model, configured or found on disk: its state, what it is, where it fits and why."""
    show.show(context.obj.get("/models"), as_json, show.catalog_table)


@app.command()
def backends(context: typer.Context, as_json: JsonOption = False) -> None:
    """Every engine, and whether it can be started here."""
    show.show(context.obj.get("/backends"), as_json, show.backends_table)


@app.command()
def vram(context: typer.Context, as_json: JsonOption = False) -> None:
    """The memory ledger, device by device, and who holds what."""
    answer = context.obj.get("/vram/status")
    show.show(answer, as_json, show.vram_table)
    holders = show.holders_table(answer)
    if not as_json and holders.row_count:
        console.print()
        console.print(holders)


NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Return at once; the model's state tells the rest.")]


@app.command()
def load(context: typer.Context, model: ModelArgument, no_wait: NoWaitOption = False, as_json: JsonOption = False) -> None:
    """Load a model now and wait until it is ready. Exit 1 when it cannot be."""
    _act(context.obj, model, "load", wait=not no_wait, as_json=as_json)


@app.command()
def unload(context: typer.Context, model: ModelArgument, no_wait: NoWaitOption = False, as_json: JsonOption = False) -> None:
    """Unload a model once its requests have ended, and wait until its memory is free."""
    _act(context.obj, model, "unload", wait=not no_wait, as_json=as_json)


def _act(server: Server, model: str, verb: str, *, wait: bool, as_json: bool) -> None:
    async def ask() -> Any:
        path = model_path(model, f"/{verb}") + query(wait=1 if wait else None)
        async with server.session() as session, told_why(server, session, model):
            return (await server.ask(session, "POST", path, within_s=None))[1]

    answer = asyncio.run(ask())
    if as_json:
        print_json(answer)
    else:
        console.print(f"{answer['model']} is", show.state(answer["state"]), end="")
        console.print(f": {answer['reason']}", markup=False)


@app.command()
def reload(
    context: typer.Context,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the verdict; exit 1 when the config is refused.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read the config again. A refused one changes nothing."""
    _, answer = context.obj.post("/reload" if wait else "/reload?wait=0")
    if as_json:
        print_json(answer)
    elif not wait:
        console.print("reload asked for")
    elif answer["last_attempt"]["ok"]:
        console.print(f"config generation {answer['generation']} applied")
    else:
        console.print(answer["last_attempt"]["message"], markup=False)
    if wait and not answer["last_attempt"]["ok"]:
        raise typer.Exit(FAILED)
