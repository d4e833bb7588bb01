"""What instances write, on its way to the journal as well: read from the end of their files, never from a pipe, and bounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from offloadd.journald import Journald
from offloadd.redaction import clean
from offloadd.runtime.logs import LogFolder, printable
from offloadd.state.ids import InstanceId
from offloadd.state.observed import InstanceView

CHUNK = 64 * 1024
"""Bytes of one instance that are passed on at once; what is beyond them stays in its file only."""
LINES = 200
"""Lines of one instance that are passed on at once."""
_LEVEL = re.compile(r"(?:\([^)]{1,60}\)\s*)?(?:[\d.:]+\s+)?(E|W|I|D|ERROR|CRITICAL|WARNING|INFO|DEBUG)\s")
"""How llama-server (`0.00.822.022 W srv …`) and vLLM (`(EngineCore) ERROR 11-25 …`) begin a line."""
_LEVELS = {"E": 3, "ERROR": 3, "CRITICAL": 2, "W": 4, "WARNING": 4, "I": 6, "INFO": 6, "D": 7, "DEBUG": 7}
_ERROR = re.compile(r"\b(error|fatal|critical|traceback|exception|panic|abort(ed)?|out of memory|failed)\b", re.IGNORECASE)
_WARNING = re.compile(r"\bwarn(ing)?\b", re.IGNORECASE)
_DEBUG = re.compile(r"\b(debug|trace)\b", re.IGNORECASE)
_NOT_ONE = re.compile(r"\b(no|0|without) (error|failure)s?\b|\berrors?[=:]\s*(0|none|false)\b", re.IGNORECASE)


class Forwarder:
    """Knows up to where each instance's output was passed on."""

    def __init__(self, folder: LogFolder, journal: Callable[[], Journald | None]) -> None:
        self._folder = folder
        self._journal = journal
        self._positions: dict[InstanceId, int] = {}
        self._rests: dict[InstanceId, bytes] = {}

    def forward(self, instances: Mapping[InstanceId, InstanceView]) -> None:
        """Pass on what is new. Blocks, for it reads files; nothing is read where the log does not go to the journal."""
        journal = self._journal()
        if journal is None:
            return
        for view in instances.values():
            self._forward(journal, view)
        for key in self._positions.keys() - instances.keys():
            self._positions.pop(key)
            self._rests.pop(key, None)

    def _forward(self, journal: Journald, view: InstanceView) -> None:
        begun = self._positions.get(view.id)
        if begun is None:
            # An adopted instance has told its beginning to an earlier daemon's journal.
            begun = self._folder.end(view.id) if view.adopted_at is not None else self._folder.begin(view.id)
        data, position = self._folder.read(view.id, begun, CHUNK)
        passed_over = max(0, self._folder.end(view.id) - position) if len(data) == CHUNK else 0
        self._positions[view.id] = position + passed_over
        *lines, rest = (self._rests.pop(view.id, b"") + data).split(b"\n")
        self._rests[view.id] = rest[-CHUNK:]
        for line in lines[:LINES]:
            _send(journal, view, line.decode(errors="replace"))
        left_out = len(lines) - LINES
        if passed_over or left_out > 0:
            said = f"{max(0, left_out)} lines and {passed_over} bytes more are in {self._folder.path(view.id)} only"
            _send(journal, view, said, priority=5)


def priority_of(line: str) -> int:
    """What an engine's line is worth, by the level that it names, else by its words: 3 an error, 4 a warning, 6 the rest."""
    named = _LEVEL.match(line)
    if named:
        return _LEVELS[named[1]]
    if _NOT_ONE.search(line):
        return 6
    return next((level for pattern, level in ((_ERROR, 3), (_WARNING, 4), (_DEBUG, 7)) if pattern.search(line)), 6)


def _send(journal: Journald, view: InstanceView, line: str, priority: int | None = None) -> None:
    text = clean(printable(line, 8192)).rstrip()
    if text:
        journal.send(
            {
                "MESSAGE": text,
                "PRIORITY": str(priority_of(text) if priority is None else priority),
                "SYSLOG_IDENTIFIER": str(view.id),
                **({"SYSLOG_PID": str(view.pid)} if view.pid else {}),
                "OFFLOADD_STREAM": "engine",
                "OFFLOADD_MODEL": str(view.model),
                "OFFLOADD_INSTANCE": str(view.id),
                "OFFLOADD_BACKEND": str(view.backend),
            }
        )
