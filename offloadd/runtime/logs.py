"""Instances' output: one file per launch, bounded in size and in number, read from its end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from offloadd.state.ids import LOCAL, InstanceId, ModelName

MAX_BYTES = 16 * 2**20
KEPT_BYTES = 2**20
KEPT_LAUNCHES = 5
TAIL_LINES = 50
_TAIL_BYTES = 64 * 1024
_SEEN_BYTES = 2**20
_LINE_LENGTH = 500
_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d+)\.log(?P<old>\.1)?")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class LogFolder:
    """The folder of the instances' logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cut_away: dict[InstanceId, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, instance: InstanceId) -> Path:
        """Where the instance's output goes."""
        return self._folder / f"{instance.model}-{instance.number}.log"

    def launches(self) -> dict[ModelName, int]:
        """Highest instance number per model that left a log, so that numbers go on after a restart of the daemon."""
        highest: dict[ModelName, int] = {}
        for found in self._entries():
            model = ModelName(found["model"])
            highest[model] = max(highest.get(model, 0), int(found["number"]))
        return highest

    def discard_old(self, instance: InstanceId) -> None:
        """Delete logs of the model's launches that are older than the last few before this one."""
        for found in self._entries():
            if found["model"] == instance.model and int(found["number"]) <= instance.number - KEPT_LAUNCHES:
                with suppress(OSError):  # a disk that refuses keeps a log too many, not a model from starting
                    (self._folder / found[0]).unlink()

    def trim(self, instances: Iterable[InstanceId]) -> None:
        """Cut files that have grown too long: the last part moves to `.1`, and the file begins anew.

        The writer has the file open for appending, so it goes on at the new end.
        """
        listed = set(instances)
        for instance in listed:
            path = self.path(instance)
            try:
                if path.stat().st_size > MAX_BYTES:
                    self._cut_away[instance] = self._cut_away.get(instance, 0) + _cut(path)
            except OSError:
                continue  # a full or vanished disk must not end the daemon; the next round tries again
        for gone in self._cut_away.keys() - listed:
            del self._cut_away[gone]

    def tail(self, instance: InstanceId, lines: int = TAIL_LINES) -> tuple[str, ...]:
        """The last lines that it wrote, made safe to show."""
        try:
            with self.path(instance).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(printable(line) for line in text.splitlines()[-lines:])

    def find(self, name: str) -> InstanceId | None:
        """The instance of this name, if it left a log. The name is looked up, never made into a path."""
        for found in self._entries():
            if f"{found['model']}-{found['number']}" == name:
                return InstanceId(LOCAL, ModelName(found["model"]), int(found["number"]))
        return None

    def newest(self, model: ModelName) -> InstanceId | None:
        """The model's latest launch that left a log."""
        number = self.launches().get(model)
        return None if number is None else InstanceId(LOCAL, model, number)

    def read(self, instance: InstanceId, position: int, limit: int) -> tuple[bytes, int]:
        """Up to `limit` bytes of what it wrote from `position` on, and the position behind them.

        Positions count from the file's beginning and on over every cut; below 0 lies what an earlier daemon had cut away.
        What is kept no more is passed over.
        """
        begin = self._cut_away.get(instance, 0)
        path = self.path(instance)
        if position < begin:
            old = _size(_kept(path))
            position = max(position, begin - old)
            if position < begin:
                found = _read_at(_kept(path), old - (begin - position), min(limit, begin - position))
                return (found, position + len(found)) if found else self.read(instance, begin, limit)
        found = _read_at(path, position - begin, limit)
        return found, position + len(found)

    def begin(self, instance: InstanceId) -> int:
        """Where what is kept of it begins."""
        return self._cut_away.get(instance, 0) - _size(_kept(self.path(instance)))

    def end(self, instance: InstanceId) -> int:
        """Where what it wrote ends."""
        return self._cut_away.get(instance, 0) + _size(self.path(instance))

    def before_end(self, instance: InstanceId, lines: int) -> int:
        """Where the last so many of its lines begin, within what a person may want to see of them."""
        end = self.end(instance)
        position = max(self.begin(instance), end - _SEEN_BYTES)
        text = b""
        while position + len(text) < end:
            piece, _ = self.read(instance, position + len(text), end - position - len(text))
            if not piece:
                break
            text += piece
        at = len(text.removesuffix(b"\n"))
        for _ in range(lines):
            at = text.rfind(b"\n", 0, max(at, 0))
            if at < 0:
                return position
        return position + (at + 1 if lines else len(text))

    def _entries(self) -> list[re.Match[str]]:
        try:
            names = [entry.name for entry in self._folder.iterdir()]
        except OSError:
            return []
        return [found for name in names if (found := _NAME.fullmatch(name))]


def printable(line: str, length: int = _LINE_LENGTH) -> str:
    """One line without colours or control characters, cut to a length that a log line can carry."""
    return _CONTROL.sub("", line.replace("\t", " ").replace("\n", " "))[:length]


def _cut(path: Path) -> int:
    """Keep the end of the file beside it, and empty it; how many bytes it had."""
    with path.open("rb") as source, _kept(path).open("wb") as kept:
        source.seek(-KEPT_BYTES, os.SEEK_END)
        shutil.copyfileobj(source, kept)
        size = source.tell()
    os.truncate(path, 0)
    return size


def _kept(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_at(path: Path, offset: int, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(limit)
    except OSError:
        return b""
