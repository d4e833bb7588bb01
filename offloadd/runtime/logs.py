"""Instances' output: one file per launch, bounded in size and in number, read from its end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from offloadd.state.ids import InstanceId, ModelName

MAX_BYTES = 16 * 2**20
KEPT_BYTES = 2**20
KEPT_LAUNCHES = 5
TAIL_LINES = 50
_TAIL_BYTES = 64 * 1024
_LINE_LENGTH = 500
_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d+)\.log(?P<old>\.1)?")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class LogFolder:
    """The folder of the instances' logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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
        for instance in instances:
            path = self.path(instance)
            try:
                if path.stat().st_size > MAX_BYTES:
                    _cut(path)
            except OSError:
                continue  # a full or vanished disk must not end the daemon; the next round tries again

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

    def _entries(self) -> list[re.Match[str]]:
        try:
            names = [entry.name for entry in self._folder.iterdir()]
        except OSError:
            return []
        return [found for name in names if (found := _NAME.fullmatch(name))]


def printable(line: str) -> str:
    """One line without colours or control characters, cut to a length that a log line can carry."""
    return _CONTROL.sub("", line.replace("\t", " "))[:_LINE_LENGTH]


def _cut(path: Path) -> None:
    with path.open("rb") as source, path.with_name(path.name + ".1").open("wb") as kept:
        source.seek(-KEPT_BYTES, os.SEEK_END)
        shutil.copyfileobj(source, kept)
    os.truncate(path, 0)
