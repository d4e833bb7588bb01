"""`offloadd import`: print the config that another program's becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from offloadd.backends import discover
from offloadd.config import SourceText, SystemSecrets, load
from offloadd.errors import OffloaddError
from offloadd.migrate.report import Migration
from offloadd.terminal import FAILED

app = typer.Typer(
    help="Make a config out of another program's. What cannot be carried over is listed with its line, on standard error and at "
    "the head of the config.",
    no_args_is_help=True,
)
FileArgument = Annotated[Path, typer.Argument(help="The file to import.", exists=True, dir_okay=False)]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write it here, where no file is yet; default: standard output.")
]


@app.command("llama-swap")
def llama_swap(file: FileArgument, output: OutputOption = None) -> None:
    """llama-swap's config.yaml: models, macros, filters, groups, matrix, hooks, keys and peers."""
    # Imported where it is used, as are the others: the daemon's start, which has clients waiting, would pay for them.
    from offloadd.migrate.llama_swap import import_llama_swap

    _finish(import_llama_swap(file), output)


@app.command("ollama")
def ollama(
    path: Annotated[
        Path | None, typer.Argument(help="Ollama's models folder, or one Modelfile; default: where it usually is.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Ollama's store, whose files stay where they are, or one Modelfile."""
    from offloadd.migrate.ollama import import_ollama

    _finish(import_ollama(path), output)


@app.command("llama-server-presets")
def presets(file: FileArgument, output: OutputOption = None) -> None:
    """llama-server's INI file of models (--models-preset)."""
    from offloadd.migrate.presets import import_presets

    _finish(import_presets(file), output)


def _finish(made: Migration, output: Path | None) -> None:
    """Write it, list what was left, and say what `offloadd check` would say."""
    text = made.text()
    if output is None:
        print(text, end="")
    else:
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OffloaddError(f"cannot write {output}: {error.strerror}") from None
    for left in made.left:
        print(left, file=sys.stderr)
    name = str(output or "the new config")
    count = f"{len(made.models)} model{'s' if len(made.models) != 1 else ''}"
    print(f"{name}: {count} from {made.title}, {len(made.left)} notes", file=sys.stderr)
    loaded = load([SourceText(name, text)], backends=discover(), secrets=SystemSecrets())
    if not loaded.ok:
        print(loaded.render(), end="", file=sys.stderr)
        raise typer.Exit(FAILED)
