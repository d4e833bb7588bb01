"""The application that the commands are added to, and what they share: the daemon, the model, how JSON is asked for."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from offloadd import __version__
from offloadd.client import DEFAULT_SERVER, Server
from offloadd.errors import OffloaddError
from offloadd.terminal import run_app

_COMPLETE_WITHIN_S = 2

app = typer.Typer(
    help="Ask and steer a running offloadd.\n\nExit codes: 0 fine, 1 a refusal or no daemon, 2 wrong usage, 3 a bug.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes of the contract."""
    run_app(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar="OFFLOADD_SERVER", help="The daemon's address: http://host:port, or unix:/path of its socket.")
    ] = DEFAULT_SERVER,
    key: Annotated[
        str,
        typer.Option(
            "--key", envvar="OFFLOADD_KEY", hidden=True, help="API key; better in the environment, where ps shows it to nobody."
        ),
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    context.obj = Server(server, key)
    with contextlib.suppress(OffloaddError):
        context.obj.url  # noqa: B018
        return
    raise typer.BadParameter(f'"{server}" is no address of a daemon: write http://host:port, or unix:/path', param_hint="--server")


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Names of models for the shell, from the daemon that the command line means; none when it does not answer at once."""
    given: dict[str, Any] = context.find_root().params
    server = Server(given.get("server") or DEFAULT_SERVER, given.get("key") or "")
    try:
        _, answer = server.call("GET", "/models", within_s=_COMPLETE_WITHIN_S)
        return [entry["id"] for entry in answer["data"] if entry["id"].startswith(incomplete)]
    except (OffloaddError, KeyError, TypeError):
        return []


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.", autocompletion=complete_model)]
