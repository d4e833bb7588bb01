"""What instances write, passed on to the journal from the ends of their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.journald import Journald
from offloadd.runtime.forward import CHUNK, LINES, Forwarder, priority_of
from offloadd.runtime.logs import LogFolder
from offloadd.state.observed import InstanceView
from offloadd.units import Instant
from tests.unit.plan.build import view


class Kept(Journald):
    """A journal that keeps what it is sent."""

    def __init__(self) -> None:
        self.entries: list[dict[str, str]] = []

    def send(self, fields: object) -> bool:
        self.entries.append(dict(fields))  # type: ignore[call-overload]
        return True

    @property
    def lines(self) -> list[str]:
        found = [entry["MESSAGE"] for entry in self.entries]
        self.entries.clear()
        return found


@pytest.fixture
def journal() -> Kept:
    return Kept()


@pytest.fixture
def folder(tmp_path: Path) -> LogFolder:
    return LogFolder(tmp_path)


@pytest.fixture
def forwarder(folder: LogFolder, journal: Kept) -> Forwarder:
    return Forwarder(folder, lambda: journal)


def write(folder: LogFolder, instance: InstanceView, text: str) -> None:
    with folder.path(instance.id).open("a") as file:
        file.write(text)


def test_lines_are_passed_on_once_each_with_whose_they_are(forwarder: Forwarder, folder: LogFolder, journal: Kept) -> None:
    one = view("a-1", 1, pid=77)
    write(folder, one, "first\nsecond \x1b[31mred\x1b[0m\nhalf")
    forwarder.forward({one.id: one})
    assert journal.entries[0] == {
        "MESSAGE": "first",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "a-1",
        "SYSLOG_PID": "77",
        "OFFLOADD_STREAM": "engine",
        "OFFLOADD_MODEL": "a",
        "OFFLOADD_INSTANCE": "a-1",
        "OFFLOADD_BACKEND": str(one.backend),
    }
    assert journal.lines == ["first", "second red"]
    write(folder, one, " and half\n\n   \n")
    forwarder.forward({one.id: one})
    forwarder.forward({one.id: one})
    assert journal.lines == ["half and half"]


def test_an_adopted_servers_beginning_was_told_by_another(forwarder: Forwarder, folder: LogFolder, journal: Kept) -> None:
    adopted = view("a-1", 1, adopted_at=Instant(5))
    write(folder, adopted, "told before\n")
    forwarder.forward({adopted.id: adopted})
    write(folder, adopted, "new\n")
    forwarder.forward({adopted.id: adopted})
    assert journal.lines == ["new"]


def test_a_flood_is_bounded_and_the_file_is_named(forwarder: Forwarder, folder: LogFolder, journal: Kept) -> None:
    one = view("a-1", 1)
    write(folder, one, "x\n" * 5 * CHUNK)
    forwarder.forward({one.id: one})
    *lines, last = journal.lines
    assert lines == ["x"] * LINES
    assert last.startswith(f"{CHUNK // 2 - LINES} lines and {9 * CHUNK} bytes more are in ")
    write(folder, one, "after it\n")
    forwarder.forward({one.id: one})
    assert journal.lines == ["after it"]


def test_a_line_without_end_is_bounded(forwarder: Forwarder, folder: LogFolder, journal: Kept) -> None:
    one = view("a-1", 1)
    for _ in range(4):
        write(folder, one, "y" * (CHUNK - 1))
        forwarder.forward({one.id: one})
    write(folder, one, "\n")
    forwarder.forward({one.id: one})
    (line,) = journal.lines
    assert len(line) == 8192


def test_nothing_is_read_where_the_log_goes_elsewhere(folder: LogFolder) -> None:
    one = view("a-1", 1)
    forwarder = Forwarder(folder, lambda: None)
    forwarder.forward({one.id: one})
    assert not forwarder._positions


def test_who_is_gone_is_forgotten(forwarder: Forwarder, folder: LogFolder) -> None:
    one = view("a-1", 1)
    write(folder, one, "x")
    forwarder.forward({one.id: one})
    forwarder.forward({})
    assert (forwarder._positions, forwarder._rests) == ({}, {})


@pytest.mark.parametrize(
    ("line", "priority"),
    [
        ("ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected", 3),
        ("ERROR 11-25 23:42:01 [core.py:1] EngineCore failed to start.", 3),
        ("CUDA error: out of memory", 3),
        ("Traceback (most recent call last):", 3),
        ("E srv: could not load", 3),
        ("0.00.822.022 W srv          init: --cache-idle-slots requires --cache-ram, disabling", 4),
        ("0.00.827.037 I srv  llama_server: failed requests are retried", 6),
        ("(EngineCore_0 pid=12) CRITICAL 11-25 it is over", 2),
        ("Internal Server Error", 3),
        ("W llama_context: n_ctx_seq (1024) < n_ctx_train (2048)", 4),
        ("WARNING 11-25 [config.py:2] casting to bfloat16", 4),
        ("warn: something", 4),
        ("DEBUG 11-25 tick", 7),
        ("main: server is listening on http://127.0.0.1:1", 6),
        ("done, 0 errors", 6),
        ("I load_model: failover is off", 6),
        ("finished with error=None", 6),
    ],
)
def test_priorities_are_guessed_from_the_engines_own_words(line: str, priority: int) -> None:
    assert priority_of(line) == priority
