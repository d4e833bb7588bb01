"""JSON pointers (RFC 6901), by which a config says where things stand in an engine's own JSON."""

from __future__ import annotations

import re
from typing import Any

from offloadd.state.wire import Pointer

MAX_STEPS = 16
"""Deeper than any API goes."""
PATTERN = r"^(/([^~/]|~[01])*)*$"
_POINTER = re.compile(PATTERN.replace("$", r"\Z"))
_PLACE = re.compile(r"(0|[1-9][0-9]{0,5})\Z")


def parse(text: str) -> Pointer:
    """`/a/0/b` as its steps; ValueError says what is wrong with it."""
    if _POINTER.match(text) is None:
        raise ValueError('expected a JSON pointer such as "/result/0/text"')
    steps = tuple(step.replace("~1", "/").replace("~0", "~") for step in text.split("/")[1:])
    if len(steps) > MAX_STEPS:
        raise ValueError(f"a pointer has at most {MAX_STEPS} steps")
    return steps


def written(pointer: Pointer) -> str:
    """The pointer as `parse` reads it."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in pointer)


def find(document: Any, pointer: Pointer) -> Any:
    """What stands there; None where nothing does."""
    for step in pointer:
        if isinstance(document, dict):
            document = document.get(step)
        elif isinstance(document, list) and _PLACE.match(step) and int(step) < len(document):
            document = document[int(step)]
        else:
            return None
    return document


def put(document: dict[str, Any], pointer: Pointer, value: Any) -> None:
    """Put a value there. Objects on the way are made, lists are not; ValueError when something else is in the way."""
    here: Any = document
    for depth, step in enumerate(pointer):
        last = depth == len(pointer) - 1
        if isinstance(here, dict):
            here[step] = value if last else here.get(step, {})
            here = here[step]
        elif isinstance(here, list) and _PLACE.match(step) and int(step) < len(here):
            here[int(step)] = value if last else here[int(step)]
            here = here[int(step)]
        else:
            what = "a list, which has no such place" if isinstance(here, list) else "no object"
            raise ValueError(f"{written(pointer[:depth]) or 'the body'} is {what}")
