"""Reading config files and secrets: the only place of the config layer that touches a disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TypeVar

from offloadd.config.source import MAX_TEXT, SourceText
from offloadd.errors import OffloaddError

_Text = TypeVar("_Text", str, str | None)
_ENDINGS = (".yaml", ".yml", ".json")
_MAX_FILES = 1000
_MAX_SECRET = 64 * 2**10


class ConfigUnreadableError(OffloaddError):
    """The config is missing, not a plain file, too big or not text. Nothing is known of what it asks for."""


def read_sources(path: Path) -> tuple[SourceText, ...]:
    """The text of one file, or of a directory's `*.yaml`, `*.yml` and `*.json` in name order.

    Raises ConfigUnreadableError. A pipe or a device is never opened: reading one could wait for ever.
    """
    try:
        paths = _listed(path) if path.is_dir() else [path]
    except OSError as problem:
        raise _unreadable(path, problem) from None
    sources: list[SourceText] = []
    left = MAX_TEXT
    for each in paths:
        data = _config_bytes(each, left)
        left -= len(data)
        sources.append(SourceText(str(each), _text(each, data)))
    return tuple(sources)


class SystemSecrets:
    """`${env:NAME}` from the daemon's own environment and `${file:/path}` from disk."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        """All that was looked up, for whoever must not write it."""

    def env(self, name: str) -> str | None:
        """A variable's value, None when it is not set."""
        return self._noted(os.environ.get(name))

    def file(self, path: str) -> str:
        """A file's text, at most 64 KiB; raises OSError, or ValueError when it is not UTF-8."""
        return self._noted(_read(Path(path), _MAX_SECRET).decode())

    def _noted(self, value: _Text) -> _Text:
        if value:
            self.known.add(value)
        return value


def _listed(folder: Path) -> list[Path]:
    found = sorted(entry for entry in folder.iterdir() if entry.name.endswith(_ENDINGS) and not entry.name.startswith("."))
    if not found:
        raise ConfigUnreadableError(f"{folder} holds no *.yaml, *.yml or *.json", hint="put a config file there, or name one")
    if len(found) > _MAX_FILES:
        raise ConfigUnreadableError(f"{folder} holds more than {_MAX_FILES} config files", hint="is it the right directory?")
    return found


def _config_bytes(path: Path, limit: int) -> bytes:
    try:
        return _read(path, limit)
    except OSError as problem:
        raise _unreadable(path, problem) from None


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise ConfigUnreadableError(f"{path}:{line}: not UTF-8 text", hint="save the file as UTF-8") from None


def _read(path: Path, limit: int) -> bytes:
    """A regular file's bytes; raises OSError also when there are more than `limit`."""
    _check_regular(path.stat().st_mode)
    # Between the look and the open it may have been replaced: O_NONBLOCK keeps a pipe from holding us up.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor).st_mode)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(0, "it is too big")
    return data


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")


def _unreadable(path: Path, problem: OSError) -> ConfigUnreadableError:
    hints = {FileNotFoundError: "check the path given with -c", PermissionError: "let the daemon's user read it"}
    why = (problem.strerror or str(problem)).lower()
    return ConfigUnreadableError(f"cannot read {path}: {why}", hint=hints.get(type(problem), ""))
