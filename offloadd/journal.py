"""How the log is written: one line per event, readable on a terminal, and nothing in it that could pass for another line."""

from __future__ import annotations

import logging
import re
import sys

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class LineFormatter(logging.Formatter):
    """Time, level and message. Control characters are shown as escapes; only our own line ends stay."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().format(record))


class WithoutTraceback(logging.Filter):
    """aiohttp logs a traceback for every malformed request; the line that says what was wrong is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the record, drop its traceback."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = "refused a malformed request: %s", (str(record.exc_info[1])[:200].replace("\n", " "),)
            record.exc_info = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def set_up(level: int = logging.INFO) -> None:
    """Log to standard error, which systemd takes to the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("aiohttp.server").addFilter(WithoutTraceback())
    for noisy in ("watchfiles", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
