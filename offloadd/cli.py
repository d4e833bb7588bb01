"""The `offloadd` command: run the daemon, check a config, print its schema, show it working."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from offloadd import __version__, allocator, eventloop, journal, preview
from offloadd.accounts import trouble_with
from offloadd.backends import discover
from offloadd.client import DEFAULT_SERVER, Server
from offloadd.config import ConfigUnreadableError, Loaded, SystemSecrets, json_schema, load, read_sources, render_json
from offloadd.daemon import serve
from offloadd.errors import OffloaddError
from offloadd.migrate.commands import app as import_app
from offloadd.registry.lives import LifeBook
from offloadd.runtime.reap import reap as end_leftovers
from offloadd.systemd import Manager
from offloadd.terminal import FAILED, JsonOption, run_app

DEFAULT_CONFIG = Path("/etc/offloadd/offloadd.yaml")

app = typer.Typer(
    help="One daemon that owns the LLM server processes of a GPU machine.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

app.add_typer(import_app, name="import")

ConfigArgument = Annotated[Path, typer.Argument(help="A config file, or a directory of them.")]


def main() -> None:
    """Run the command; exit 0 fine, 1 foreseen failure, 2 wrong usage, 3 a bug."""
    run_app(app)


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", "-c", help="A config file, or a directory of them.")] = DEFAULT_CONFIG,
    log: Annotated[
        journal.LogFormat,
        typer.Option(envvar="OFFLOADD_LOG", help="auto is the journal where standard error leads there, else text."),
    ] = journal.LogFormat.AUTO,
) -> None:
    """Run the daemon until SIGTERM. SIGHUP reloads the config, as does a change of its file."""
    allocator.settle()
    journal.set_up(form=log)
    eventloop.run(serve(config, discover(), manager=Manager.from_environment()))


@app.command()
def reap(
    data_dir: Annotated[Path, typer.Argument(envvar="STATE_DIRECTORY", help="The data folder of the daemon that started them.")],
    kept: Annotated[bool, typer.Option("--kept", help="Also what was left running on purpose, by server.on_stop: keep.")] = False,
) -> None:
    """End the servers of a daemon that is gone and will not come back, by their stop_command where they have one.

    As ExecStopPost= it acts only after a clean end.
    """
    print(end_leftovers(data_dir, kept=kept, book=LifeBook))


@app.command()
def check(path: ConfigArgument, as_json: JsonOption = False) -> None:
    """Say everything that is wrong with a config, with file, line and column. Exit 1 if it would be refused."""
    loaded = _load(path)
    if as_json:
        print(json.dumps({"ok": loaded.ok, "diagnostics": render_json(loaded.diagnostics)}, indent=2))
    else:
        text = loaded.render()
        print(text, end="\n" if text and not text.endswith("\n") else "")
        print(_verdict(path, loaded))
    if not loaded.ok:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    path: ConfigArgument,
    server: Annotated[str, typer.Option(envvar="OFFLOADD_SERVER", help="Address of the daemon's API.")] = DEFAULT_SERVER,
    key: Annotated[str, typer.Option(envvar="OFFLOADD_KEY", help="API key.", show_default=False)] = "",
    as_json: JsonOption = False,
) -> None:
    """Ask a running daemon what this config would start, stop, replace and evict. Exit 4 if anything would change."""
    answer = preview.ask(Server(server, key), path)
    print(json.dumps(answer, indent=2) if as_json else preview.as_text(answer))
    if answer["changed"]:
        raise typer.Exit(preview.SOMETHING_TO_CHANGE)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors and for Nix."""
    print(json.dumps(json_schema(discover()), indent=2))


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Ask one question and exit.")] = False,
    question: Annotated[str, typer.Option(help="What to ask.")] = "What is gravity?",
    port: Annotated[int, typer.Option(help="Port to listen on; taken from the free ones if it is in use.")] = 9000,
) -> None:
    """Serve a small real model with a real llama-server, and ask it something through the port."""
    # It paints what it shows, with a library that a daemon's start must not wait for.
    from offloadd.demo import run_demo

    asyncio.run(run_demo(once=once, question=question, port=port))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _load(path: Path) -> Loaded:
    try:
        sources = read_sources(path)
    except ConfigUnreadableError as error:
        raise OffloaddError(f"{error.message}", hint=error.hint) from None
    return load(sources, backends=discover(), secrets=SystemSecrets(), trouble=trouble_with)


def _verdict(path: Path, loaded: Loaded) -> str:
    if loaded.desired is None:
        count = len(loaded.errors)
        return f"{path}: refused, {count} error{'s' if count != 1 else ''}"
    models = len(loaded.desired.models)
    return f"{path}: good, {models} model{'s' if models != 1 else ''}"
