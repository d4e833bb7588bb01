"""`offloadd plan`: asks a running daemon what a config would change, and shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offloadd.client import Server
from offloadd.config import ConfigUnreadableError, read_sources
from offloadd.errors import OffloaddError
from offloadd.units import format_bytes

SOMETHING_TO_CHANGE = 4
"""Exit code when the config in the file is not what the daemon does."""


def ask(server: Server, path: Path) -> dict[str, Any]:
    """The daemon's answer; OffloaddError when the config is not good, with every diagnostic."""
    try:
        sources = [{"name": source.name, "text": source.text} for source in read_sources(path)]
    except ConfigUnreadableError as error:
        raise OffloaddError(error.message, hint=error.hint) from None
    _, answer = server.post("/plan", {"sources": sources})
    if not answer["ok"]:
        raise OffloaddError(f"{path} would be refused:\n{answer['message']}")
    return dict(answer)


def as_text(answer: dict[str, Any]) -> str:
    """The answer for a terminal."""
    return "\n".join(_lines(answer))


def _lines(answer: dict[str, Any]) -> Iterator[str]:
    if not answer["changed"]:
        yield "nothing would change"
        return
    for section in answer["sections"]:
        yield f"{section}: changed"
    for model in answer["models"]:
        yield from _model(model)
    for device in answer["devices"]:
        before, after = device["before"], device["after"]
        if before and after:
            promised = f"{format_bytes(before['reserved_bytes'])} → {format_bytes(after['reserved_bytes'])} promised"
            yield f"{device['label']}: {promised} of {format_bytes(after['limit_bytes'])}"
    if not answer["settled"]:
        yield "there is more to it than could be followed: some models take turns"


def _model(model: dict[str, Any]) -> Iterator[str]:
    edit = "" if model["edit"] == "none" else f" ({model['edit']}{': ' if model['fields'] else ''}{', '.join(model['fields'])})"
    yield f"{model['model']}: {model['effect']}{edit}"
    for start in model["starts"]:
        where = ", ".join(f"{format_bytes(size)} on {device}" for device, size in start["devices"].items())
        yield f"    starts {start['instance']} on {start['backend']}{f' with {where}' if where else ''}: {start['why']}"
    for end in model["ends"]:
        yield f"    ends {end['instance']}: {end['why']}"
    if model["after"] and model["after"]["state"] not in ("off", "ready"):
        yield f"    then {model['after']['state']}: {model['after']['reason']}"
