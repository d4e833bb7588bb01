"""The log's forms, its bounds, and what journald is sent: heard by a socket in journald's place."""

from __future__ import annotations

import array
import io
import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd import journal, redaction
from offloadd.events import EventKind, about, message_id
from offloadd.journal import JournalHandler, JsonFormatter, LineFormatter, LogFormat, RateLimit
from offloadd.journald import Journald, attached, encode

CATALOG = Path(__file__).parents[2] / "systemd/offloadd.catalog"


class Peer:
    """Sits where journald would, and reads as it does."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.socket.settimeout(10)

    def entry(self) -> dict[str, str]:
        data, ancillary, _, _ = self.socket.recvmsg(2**20, socket.CMSG_SPACE(4))
        for _, _, raw in ancillary:
            (fd,) = array.array("i", raw)
            with os.fdopen(fd, "rb") as file:
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, 0)  # sealed, as journald demands
                file.seek(0)
                data = file.read()
        return decode(data)


def decode(data: bytes) -> dict[str, str]:
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, given, value = line.partition(b"=")
        if not given:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[9 + size :]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    found = Peer(tmp_path / "socket")
    yield found
    found.socket.close()


@pytest.fixture
def log(peer: Peer) -> Iterator[logging.Logger]:
    yield from logger(JournalHandler(Journald(peer.address)))


def logger(handler: logging.Handler) -> Iterator[logging.Logger]:
    found = logging.Logger("offloadd.test")
    found.addHandler(handler)
    yield found
    handler.close()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    redaction._known.clear()
    redaction.hide([])


def test_an_event_has_the_fields_of_the_contract(log: logging.Logger, peer: Peer) -> None:
    said = about(
        EventKind.INSTANCE_READY, model="m", instance="m-1", backend="llamacpp", request="r", load_ms=332, **{"odd key!": "x"}
    )
    log.warning("%s: ready", "m-1", extra=said)
    entry = peer.entry()
    assert entry["MESSAGE"] == "m-1: ready"
    assert entry["PRIORITY"] == "4"
    assert entry["MESSAGE_ID"] == message_id(EventKind.INSTANCE_READY)
    assert re.fullmatch("[0-9a-f]{32}", entry["MESSAGE_ID"])
    assert entry["SYSLOG_IDENTIFIER"] == "offloadd"
    named = {name: value for name, value in entry.items() if name.startswith("OFFLOADD_")}
    assert named == {
        "OFFLOADD_EVENT": "instance-ready",
        "OFFLOADD_MODEL": "m",
        "OFFLOADD_INSTANCE": "m-1",
        "OFFLOADD_BACKEND": "llamacpp",
        "OFFLOADD_REQUEST": "r",
        "OFFLOADD_LOAD_MS": "332",
        "OFFLOADD_ODD_KEY_": "x",
        "OFFLOADD_LOGGER": "offloadd.test",
    }
    assert entry["CODE_FILE"] == __file__
    assert entry["CODE_FUNC"] == "test_an_event_has_the_fields_of_the_contract"
    assert int(entry["CODE_LINE"]) > 0


@pytest.mark.parametrize(
    ("level", "priority"), [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")]
)
def test_levels_are_priorities(log: logging.Logger, peer: Peer, level: str, priority: str) -> None:
    getattr(log, level)("x")
    assert peer.entry()["PRIORITY"] == priority


def test_a_message_cannot_pass_for_a_field(log: logging.Logger, peer: Peer) -> None:
    log.info("first\nPRIORITY=0\n<3>MESSAGE=second", extra=about(EventKind.DECISION, model="a\nOFFLOADD_EVENT=forged"))
    entry = peer.entry()
    assert entry["MESSAGE"] == "first\nPRIORITY=0\n<3>MESSAGE=second"
    assert (entry["PRIORITY"], entry["OFFLOADD_EVENT"]) == ("6", "decision")
    assert entry["OFFLOADD_MODEL"] == "a\nOFFLOADD_EVENT=forged"


def test_a_traceback_goes_with_its_message(log: logging.Logger, peer: Peer) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it failed")
    assert re.match(r"it failed\nTraceback .*\n(.*\n)*ValueError: why$", peer.entry()["MESSAGE"])


def test_what_is_too_large_for_a_datagram_goes_in_a_sealed_file(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offloadd.journald._BUFFER", 2**16)
    journald = Journald(peer.address)
    assert journald.send({"MESSAGE": "x" * 2**20, "PRIORITY": "6"})
    assert peer.entry() == {"MESSAGE": "x" * 2**20, "PRIORITY": "6"}
    journald.close()


def test_a_journal_that_takes_nothing_stops_nobody_and_is_told_what_was_lost(log: logging.Logger, peer: Peer) -> None:
    count = 0
    journald = Journald(peer.address)
    while journald.send({"MESSAGE": "x" * 1000}):
        count += 1
        assert count < 100_000
    assert not journald.send({"MESSAGE": "lost too"})
    for _ in range(count):
        peer.entry()
    assert journald.send({"MESSAGE": "again"})
    assert peer.entry() == {"MESSAGE": "again", "OFFLOADD_LOST": "2"}
    journald.close()


def test_a_journal_that_is_not_there_stops_nobody(tmp_path: Path) -> None:
    journald = Journald(str(tmp_path / "nobody"))
    assert not journald.send({"MESSAGE": "x"})
    journald.close()


def test_encoding_survives_what_text_can_hold() -> None:
    assert decode(encode([("A", "ä\x00=\n"), ("B", "\ud800")])) == {"A": "ä\x00=\n", "B": "?"}


def test_the_journal_is_used_where_standard_error_leads_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        found = os.fstat(stream.fileno())
        here = f"{found.st_dev}:{found.st_ino}"
        assert attached(stream.fileno(), here)
        monkeypatch.setattr(sys, "stderr", stream)
        handler = journal._handler(LogFormat.AUTO, {"JOURNAL_STREAM": here})
        assert isinstance(handler, JournalHandler)
        handler.close()
        assert isinstance(journal._handler(LogFormat.TEXT, {"JOURNAL_STREAM": here}), logging.StreamHandler)
        for elsewhere in ({}, {"JOURNAL_STREAM": "1:2"}, {"JOURNAL_STREAM": "nonsense"}):
            assert isinstance(journal._handler(LogFormat.AUTO, elsewhere).formatter, LineFormatter)
    assert not attached(-1, "0:0")


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    (log,) = logger(handler)
    log.error("a\nb\x1b[31m", extra=about(EventKind.CONFIG_REFUSED, model="m", generation=3, path=Path("/x")))
    log.info("plain")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first.pop("source").startswith("offloadd.test:")
    assert first == {
        "level": "error",
        "message": "a\nb\x1b[31m",
        "event": "config-refused",
        "message_id": message_id(EventKind.CONFIG_REFUSED),
        "model": "m",
        "data": {"generation": 3, "path": "/x"},
    }
    assert set(second) == {"time", "level", "message", "source"}


@pytest.mark.parametrize("form", ["journal", "text", "json"])
def test_known_secrets_are_in_no_form_of_the_log(form: str, peer: Peer) -> None:
    secret = "sk-9f2e-canary/+=4711"
    redaction.hide([f"{secret}\n", "short", ""])
    stream = io.StringIO()
    handler: logging.Handler = JournalHandler(Journald(peer.address)) if form == "journal" else logging.StreamHandler(stream)
    if form != "journal":
        handler.setFormatter(LineFormatter() if form == "text" else JsonFormatter())
    for log in logger(handler):
        log.error("key %s and short", secret, extra=about(EventKind.DECISION, model=secret, url=f"https://x/{secret}"))
        written = json.dumps(peer.entry()) if form == "journal" else stream.getvalue()
    assert "canary" not in written
    assert "key *** and short" in written


def test_the_latest_secrets_are_known_and_no_endless_number() -> None:
    redaction.hide(f"secret-number-{number}" for number in range(3000))
    assert redaction.clean("secret-number-2999 secret-number-0") == "*** secret-number-0"
    redaction.hide(["longest-secret", "longest-secret-of-two"])
    assert redaction.clean("longest-secret-of-two") == "***"


def test_one_place_writes_so_often_and_then_says_how_much_was_left_out() -> None:
    limit = RateLimit()

    def at(second: float, line: int = 1) -> logging.LogRecord:
        record = logging.LogRecord("x", logging.INFO, "file.py", line, "again", None, None)
        record.created = second
        return record

    passed = sum(limit.filter(at(number / 1000)) for number in range(5000))
    assert passed == 2000
    assert limit.filter(at(5, line=2)), "another place is not held back"
    later = at(20)
    assert limit.filter(later)
    assert later.getMessage() == "again (3000 lines like this were left out)"
    earlier = at(3)  # the clock was set back
    assert limit.filter(earlier)


def test_the_catalogue_has_an_entry_for_each_kind_of_event_and_no_other() -> None:
    entries = {
        found[1]: found[2]
        for found in re.finditer(r"^-- ([0-9a-f]{32})\n(.*?)(?=^# |\Z)", CATALOG.read_text(), re.DOTALL | re.MULTILINE)
    }
    assert entries.keys() == {message_id(kind) for kind in EventKind}
    for kind in EventKind:
        text = entries[message_id(kind)]
        assert f"# {kind}\n-- {message_id(kind)}" in CATALOG.read_text()
        assert re.fullmatch(r"Subject: \S.*\nDefined-By: offloadd\n\n\S[^\n]*\n(?:\S[^\n]*\n)*\n*", text), text
