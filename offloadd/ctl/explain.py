"""`offloadctl explain`: why a model is in the state that it is in, and what became of a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from offloadd.client import Server, query
from offloadd.ctl import show
from offloadd.ctl.app import app, complete_model
from offloadd.ctl.follow import event_line
from offloadd.ctl.show import Json
from offloadd.terminal import JsonOption
from offloadd.units import format_seconds


@app.command()
def explain(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="[MODEL]", help="A model's name or alias; without it, all of them.", autocompletion=complete_model),
    ] = "",
    request: Annotated[str, typer.Option(help="A request's way instead, by the X-Request-Id of its answer.")] = "",
    instance: Annotated[str, typer.Option(help="What happened to one instance instead, such as llama-3.")] = "",
    count: Annotated[int, typer.Option("--lines", "-n", min=1, max=10_000, help="How much of its history.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Why a model waits, was evicted or was placed where it is, with what happened to it lately."""
    server: Server = context.obj
    if sum(map(bool, (model, request, instance))) > 1:
        raise typer.BadParameter("give a MODEL, or --request, or --instance")
    if model:
        show.show(server.get(f"/explain/{quote(model, safe='/:@')}{query(limit=count)}"), as_json, _of_model)
    elif request or instance:
        asked = query(request=request or None, instance=instance or None, limit=count)
        show.show(server.get(f"/explain{asked}"), as_json, _of_history)
    else:
        show.show(server.get(f"/explain{query(limit=count)}"), as_json, _of_all)


def _of_model(answer: Json) -> RenderableType:
    return Group(*_decision(answer), *_history("lately", answer["history"]), *_history("requests", answer["requests"]))


def _of_all(answer: Json) -> RenderableType:
    decisions = [line for decision in answer["decisions"] for line in _decision(decision)]
    loans = [Text(f"{loan}: {why}") for loan, why in answer["loans"].items()]
    return Group(*decisions, *loans, *_history("lately", answer["history"]))


def _of_history(answer: Json) -> RenderableType:
    return Group(*_history("its way", answer["history"]), *_history("meanwhile", answer.get("meanwhile", ())))


def _decision(decision: Json) -> Iterator[Text]:
    """The sentence, what to do, and the numbers beside it."""
    yield Text(f"{decision['model']} is ") + show.state(decision["state"]) + Text(f": {decision['reason']}")
    if decision["hint"]:
        yield Text(f"  hint: {decision['hint']}", "yellow")
    if decision["retry_at"] is not None:
        yield Text(f"  next try: {time.strftime('%H:%M:%S', time.localtime(decision['retry_at']))}")
    running, waiting = decision["requests_running"], decision["requests_waiting"]
    if running or waiting:
        oldest = decision["oldest_wait_s"]
        since = f", the first for {format_seconds(oldest)}" if oldest is not None else ""
        yield Text(f"  requests: {running} running, {waiting} waiting{since}")
    for engine, why in decision["engines"].items():
        yield Text(f"  not by {engine}: {why}")


def _history(title: str, entries: Iterable[Json]) -> Iterator[Text]:
    listed = list(entries)
    if listed:
        yield Text(f"{title}:", "bold")
    for entry in listed:
        yield Text("  ") + event_line(entry)
