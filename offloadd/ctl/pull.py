"""`offloadctl pull`: have the daemon download a model from the hub, and watch it."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from offloadd.client import Server
from offloadd.ctl.app import app
from offloadd.ctl.show import aside, console, print_json
from offloadd.errors import OffloaddError
from offloadd.terminal import JsonOption

_ENDED = ("landed", "failed", "cancelled")


@app.command()
def pull(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="ORG/NAME[:QUANT]", help="A repository of the hub, and which quantization.")],
    detach: Annotated[bool, typer.Option("--detach", help="Return at once; the daemon goes on, and GET /pulls tells.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Download a model into the daemon's models_path. Ctrl-C ends it; what has come is kept for the next pull of the same."""
    job = asyncio.run(_pull(context.obj, source, follow=not detach))
    if as_json:
        print_json(job)
    elif job["state"] == "landed":
        console.print("\n".join(job["paths"]), markup=False)
    elif detach:
        console.print(f"pull {job['id']} of {job['source']}: {job['state']}", markup=False)
    if job["state"] in ("failed", "cancelled"):
        raise OffloaddError(job["message"], hint=job["hint"])


async def _pull(server: Server, source: str, *, follow: bool) -> Any:
    async with server.session() as session:
        _, job = await server.ask(session, "POST", "/models/pull", {"source": source})
        if not follow:
            return job
        try:
            with _bar() as progress:
                task = progress.add_task(job["source"], total=None)
                async for _, data in server.events(session, "GET", f"/pulls/{job['id']}/events"):
                    job = json.loads(data)
                    progress.update(task, description=_words(job), total=job["total_bytes"], completed=job["done_bytes"])
        except asyncio.CancelledError:
            await asyncio.shield(server.ask(session, "DELETE", f"/pulls/{job['id']}"))
            raise
    return job


def _bar() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    speed = (TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, *speed, console=aside, transient=True, disable=not aside.is_terminal)


def _words(job: Any) -> str:
    return f"{job['state']} {job['file'] or job['source']}" if job["state"] not in _ENDED else str(job["state"])
