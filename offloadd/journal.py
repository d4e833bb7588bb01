"""How the log is written: to the journal with its fields, as text for people, or as JSON lines; bounded, and without secrets."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum

from offloadd.events import event_of, message_id
from offloadd.journald import Journald, attached
from offloadd.redaction import clean
from offloadd.units import Seconds

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_NO_FIELD = re.compile(r"[^A-Z0-9_]")
_OFTEN = 2000
_WINDOW = Seconds(10)
"""One place in the code writes at most so many lines in so long; what is left out is counted."""
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
_FIELD_LENGTH = 16 * 1024


class LogFormat(StrEnum):
    """Where the log goes and how it looks."""

    AUTO = "auto"
    """The journal where standard error leads to it, text elsewhere."""
    JOURNAL = "journal"
    TEXT = "text"
    JSON = "json"


class LineFormatter(logging.Formatter):
    """Time, level and message. Control characters are shown as escapes; only our own line ends stay."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return clean(printable(super().format(record)))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, where it comes from, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        shown: dict[str, object] = {"time": time, "level": record.levelname.lower(), "message": super().format(record)}
        said = event_of(record)
        if said is not None:
            named = {"model": said.model, "instance": said.instance, "backend": said.backend, "request": said.request}
            shown.update(event=str(said.kind), message_id=message_id(said.kind))
            shown.update({name: value for name, value in named.items() if value})
            shown.update({"data": said.data} if said.data else {})
        shown["source"] = f"{record.name}:{record.lineno}"
        return clean(json.dumps(shown, default=str, ensure_ascii=False))


class JournalHandler(logging.Handler):
    """Sends records to journald with the fields that `journalctl` filters by."""

    def __init__(self, journal: Journald) -> None:
        super().__init__()
        self.journal = journal
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send it; what journald does not take is counted there, for a log must not stop who writes it."""
        try:
            self.journal.send(self._fields(record))
        except Exception:  # noqa: BLE001  (as every logging handler does)
            self.handleError(record)

    def close(self) -> None:
        """Say no more."""
        self.journal.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        found = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITIES.get(record.levelno, 5)),
            "SYSLOG_IDENTIFIER": "offloadd",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName,
            "OFFLOADD_LOGGER": record.name,
        }
        said = event_of(record)
        if said is not None:
            found.update({_field(name): str(value) for name, value in said.data.items()})
            named = {"MODEL": said.model, "INSTANCE": said.instance, "BACKEND": said.backend, "REQUEST": said.request}
            found.update({f"OFFLOADD_{name}": value for name, value in named.items() if value})
            found.update(MESSAGE_ID=message_id(said.kind), OFFLOADD_EVENT=str(said.kind))
        return {name: clean(value)[:_FIELD_LENGTH] if name != "MESSAGE" else clean(value) for name, value in found.items()}


class RateLimit(logging.Filter):
    """Lets one place in the code write only so often; the first line after a pause says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        place = (record.pathname, record.lineno)
        begun, count = self._windows.get(place, (record.created, 0))
        if not 0 <= record.created - begun < _WINDOW:
            if count > _OFTEN:
                record.msg, record.args = f"{record.getMessage()} ({count - _OFTEN} lines like this were left out)", None
            begun, count = record.created, 0
        self._windows[place] = (begun, count + 1)
        return count < _OFTEN


class WithoutTraceback(logging.Filter):
    """aiohttp logs a traceback for every malformed request; the line that says what was wrong is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the record, drop its traceback."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = "refused a malformed request: %s", (str(record.exc_info[1])[:200].replace("\n", " "),)
            record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def printable(text: str) -> str:
    """Control characters as escapes, line ends aside."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def set_up(level: int = logging.INFO, form: LogFormat = LogFormat.TEXT) -> None:
    """Begin to log. A process that dies of a signal, the watchdog's among them, writes where it was."""
    faulthandler.enable()
    handler = _handler(form)
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("aiohttp.server").addFilter(WithoutTraceback())
    for noisy in ("watchfiles", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def journal_in_use() -> Journald | None:
    """The journal that the log goes to, for what is to be written there beside it."""
    return next((each.journal for each in logging.getLogger().handlers if isinstance(each, JournalHandler)), None)


def _handler(form: LogFormat, environ: Mapping[str, str] = os.environ) -> logging.Handler:
    leads_there = attached(sys.stderr.fileno(), environ.get("JOURNAL_STREAM", "")) if form is LogFormat.AUTO else False
    if form is LogFormat.JOURNAL or leads_there:
        return JournalHandler(Journald())
    handler = logging.StreamHandler(sys.stderr)
    text = LineFormatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else text)
    return handler


def _field(name: str) -> str:
    """A journal field's name for one of the values beside the sentence."""
    return f"OFFLOADD_{_NO_FIELD.sub('_', name.upper())}"[:64]
