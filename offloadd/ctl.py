"""The `offloadctl` command: ask a running daemon, and tell it to reload."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.table import Table

from offloadd import borrowing
from offloadd.errors import OffloaddError
from offloadd.terminal import FAILED, JsonOption, run_app
from offloadd.units import format_bytes, format_seconds

DEFAULT_SERVER = "http://127.0.0.1:9000"
_TIMEOUT_S = 60
_WIDE = 500

app = typer.Typer(help="Ask and steer a running offloadd.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = _WIDE  # a table that goes into a pipe or a file is not to be broken at 80 columns


@dataclass(frozen=True, slots=True)
class Server:
    """The daemon that is spoken to."""

    url: str

    def get(self, path: str) -> Any:
        """GET; the JSON answer. OffloaddError says what went wrong."""
        return self._call("GET", path)[1]

    def post(self, path: str) -> tuple[int, Any]:
        """POST without a body; the status and the JSON answer."""
        return self._call("POST", path)

    def _call(self, method: str, path: str) -> tuple[int, Any]:
        return asyncio.run(self._fetch(method, path))

    async def _fetch(self, method: str, path: str) -> tuple[int, Any]:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, self.url.rstrip("/") + path) as answer,
            ):
                body = await answer.json(content_type=None)
                if answer.status >= 400 and isinstance(body, dict) and "error" in body:
                    raise OffloaddError(f"{self.url} refuses: {body['error']['message']}")
                return answer.status, body
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            hint = "is the daemon running? systemctl status ml-offload-api; another address goes into --server or OFFLOADD_SERVER"
            raise OffloaddError(f"no answer from {self.url}: {error or type(error).__name__}", hint=hint) from None


def main() -> None:
    """Run the command, with the exit codes of the contract."""
    run_app(app)


@app.callback()
def _options(
    context: typer.Context,
    server: Annotated[str, typer.Option(envvar="OFFLOADD_SERVER", help="Address of the daemon's API.")] = DEFAULT_SERVER,
) -> None:
    context.obj = Server(server)


@app.command()
def status(context: typer.Context, as_json: JsonOption = False) -> None:
    """Health, models and memory in one view. Exit 1 when the daemon is not well."""
    server: Server = context.obj
    health, models, vram = server.get("/health"), server.get("/models"), server.get("/vram/status")
    if as_json:
        print(json.dumps({"health": health, "models": models["data"], "vram": vram}, indent=2))
    else:
        up, generation = format_seconds(health["uptime_s"]), health["generation"]
        console.print(f"offloadd {health['version']} is {health['status']}, up {up}, config generation {generation}")
        for problem in health["problems"]:
            console.print(f"  problem: {problem['what']}", style="yellow", markup=False)
            if problem["hint"]:
                console.print(f"           {problem['hint']}", markup=False)
        console.print(_models_table(models))
        console.print(_vram_table(vram))
    if health["status"] != "ok":
        raise typer.Exit(FAILED)


@app.command()
def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """Every model, its state and why."""
    _show(context.obj.get("/models"), as_json, _models_table)


@app.command()
def backends(context: typer.Context, as_json: JsonOption = False) -> None:
    """Every engine, and whether it can be started here."""
    _show(context.obj.get("/backends"), as_json, _backends_table)


@app.command()
def vram(context: typer.Context, as_json: JsonOption = False) -> None:
    """The memory ledger, device by device."""
    _show(context.obj.get("/vram/status"), as_json, _vram_table)


@app.command()
def reload(
    context: typer.Context,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the verdict; exit 1 when the config is refused.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read the config again. A refused one changes nothing."""
    _, answer = context.obj.post("/reload" if wait else "/reload?wait=0")
    if as_json:
        print(json.dumps(answer, indent=2))
    elif not wait:
        console.print("reload asked for")
    elif answer["last_attempt"]["ok"]:
        console.print(f"config generation {answer['generation']} applied")
    else:
        console.print(answer["last_attempt"]["message"], markup=False)
    if wait and not answer["last_attempt"]["ok"]:
        raise typer.Exit(FAILED)


@app.command(context_settings={"ignore_unknown_options": True})
def borrow(
    context: typer.Context,
    size: Annotated[str, typer.Argument(help="How much memory, such as 10GiB.")],
    command: Annotated[list[str], typer.Argument(help="The command to run with it, after --.")],
    device: Annotated[str, typer.Option(help="A GPU by index or UUID, host, or auto.")] = "auto",
    limit: Annotated[str | None, typer.Option("--for", help="Give it back after this time, such as 2h.")] = None,
) -> None:
    """Take memory out of the daemon's budget while a command runs: models leave as needed, and come back after it."""
    request = {"size": size, "device": device, "why": " ".join(command)[:200]}
    raise typer.Exit(borrowing.run(context.obj.url, {**request, **({"for": limit} if limit else {})}, command))


def _show(answer: Any, as_json: bool, table: Any) -> None:
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        console.print(table(answer))


def _models_table(answer: Any) -> Table:
    table = Table("model", "state", "fits", "waiting", "why", box=None, pad_edge=False)
    for entry in answer["data"]:
        own = entry["offloadd"]
        table.add_row(entry["id"], own["state"], own["fits"], str(own["waiting"]), own["reason"])
    return table


def _backends_table(answer: Any) -> Table:
    table = Table("backend", "available", "version", "load", "queue", "why not", box=None, pad_edge=False)
    for entry in answer["backends"]:
        available = "yes" if entry["available"] else "no"
        why = "; ".join(part for part in (entry["reason"], entry["hint"]) if part)
        table.add_row(entry["name"], available, entry["version"], str(entry["load"]), str(entry["queue"]), why)
    return table


def _vram_table(answer: Any) -> Table:
    keys = ("total", "free", "foreign", "limit", "reserved", "lent", "releasing", "room")
    table = Table("device", *keys, box=None, pad_edge=False)
    for device in answer["devices"]:
        table.add_row(f"{device['id']} ({device['name']})", *(format_bytes(device[f"{key}_bytes"]) for key in keys))
    return table
