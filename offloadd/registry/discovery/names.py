"""What found models are called: readable, the same every time, and never two alike. Pure."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

MAX_NAME = 64
_ODD = re.compile(r"[^a-z0-9._-]+")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_HUB_FOLDER = re.compile(r"models--(?P<organisation>[^/]+?)--(?P<name>.+)")
_CACHED = re.compile(r"[^_/]+_.+?-GGUF_(?P<stem>.+)", re.IGNORECASE)


def slug(text: str, path: str) -> str:
    """A model's name out of any text: lower case, digits, `.`, `_` and `-`. One that says nothing is named after its path."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = _ODD.sub("-", plain).strip("._-")
    if not name:
        return f"model-{_digest(path)}"
    if len(name) > MAX_NAME:
        return f"{name[: MAX_NAME - 7].rstrip('._-')}-{_digest(text)}"
    return name


def uncached(stem: str) -> str:
    """The file's own name, where llama.cpp's cache has put the repository's before it."""
    found = _CACHED.fullmatch(stem)
    return found["stem"] if found else stem


def repository_of(folder_name: str) -> str:
    """`ORG/NAME` of a folder in the hub's cache; empty for any other."""
    found = _HUB_FOLDER.fullmatch(folder_name)
    return f"{found['organisation']}/{found['name']}" if found else ""


def proper_aliases(names: Iterable[str], name: str) -> tuple[str, ...]:
    """Those that a client could ask for, each once."""
    return tuple(dict.fromkeys(each for each in names if each != name and _ALIAS.fullmatch(each)))


def assign(wanted: Mapping[str, str], held: Mapping[str, str]) -> dict[str, str]:
    """Path to name, for models that would be called `wanted`, given in their order.

    A path keeps the name that it `held`, as long as its file is still called so: one that comes later takes no name away.
    """
    given: dict[str, str] = {}
    taken: set[str] = set()
    for path, name in wanted.items():
        if path in held and held[path] in _choices(name, path) and held[path] not in taken:
            given[path] = held[path]
            taken.add(held[path])
    for path, name in wanted.items():
        if path not in given:
            given[path] = next(choice for choice in _choices(name, path) if choice not in taken)
            taken.add(given[path])
    return given


def _choices(name: str, path: str) -> list[str]:
    """The name alone; with the folder before it; with a mark of its path, which nobody else has."""
    folder = PurePosixPath(path).parent.name
    qualified = slug(f"{folder}-{name}", path)
    return [name, qualified, f"{name[: MAX_NAME - 7]}-{_digest(path)}", f"{name[: MAX_NAME - 17]}-{_digest(path, 16)}"]


def _digest(text: str, length: int = 6) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]
