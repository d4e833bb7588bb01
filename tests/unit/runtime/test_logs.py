"""Instances' output: read by position over every cut, from its last lines, by name only."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.runtime import logs
from offloadd.runtime.logs import LogFolder
from offloadd.state.ids import LOCAL, InstanceId, ModelName

A1 = InstanceId(LOCAL, ModelName("a"), 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogFolder:
    monkeypatch.setattr(logs, "MAX_BYTES", 100)
    monkeypatch.setattr(logs, "KEPT_BYTES", 40)
    return LogFolder(tmp_path)


def write(folder: LogFolder, text: str, instance: InstanceId = A1) -> None:
    with folder.path(instance).open("a") as file:
        file.write(text)


def rest(folder: LogFolder, position: int) -> tuple[str, int]:
    """All there is from a position on, in pieces of an odd size."""
    said = b""
    while True:
        piece, position = folder.read(A1, position, 7)
        if not piece:
            return said.decode(), position
        said += piece


def test_a_reader_misses_nothing_when_the_file_is_cut(folder: LogFolder) -> None:
    write(folder, "".join(f"{number:08}\n" for number in range(10)))
    said, position = rest(folder, 0)
    write(folder, "".join(f"{number:08}\n" for number in range(10, 13)))
    folder.trim([A1])
    write(folder, "00000013\n")
    more, position = rest(folder, position)
    assert said + more == "".join(f"{number:08}\n" for number in range(14))
    assert rest(folder, position) == ("", position)


def test_what_is_kept_no_more_is_passed_over(folder: LogFolder) -> None:
    write(folder, "x" * 200 + "\n")
    folder.trim([A1])
    write(folder, "end\n")
    assert folder.begin(A1) == 161
    assert rest(folder, 0)[0] == "x" * 39 + "\nend\n"


def test_what_an_earlier_daemon_cut_away_is_read_as_well(folder: LogFolder, tmp_path: Path) -> None:
    write(folder, "x" * 200 + "\n")
    folder.trim([A1])
    write(folder, "end\n")
    later = LogFolder(tmp_path)
    assert later.begin(A1) == -40
    assert rest(later, later.begin(A1))[0] == "x" * 39 + "\nend\n"


@given(
    kept=st.lists(st.text("ab\n", max_size=9), max_size=4),
    lines=st.integers(0, 12),
)
def test_last_lines(tmp_path_factory: pytest.TempPathFactory, kept: list[str], lines: int) -> None:
    folder = LogFolder(tmp_path_factory.mktemp("logs"))
    text = "\n".join(kept)
    write(folder, text)
    wanted = text.split("\n")
    tail = wanted if not text.endswith("\n") else wanted[:-1]
    said, _ = rest(folder, folder.before_end(A1, lines))
    assert said.removesuffix("\n") == "\n".join(tail[len(tail) - lines :] if lines < len(tail) else tail)


def test_last_lines_reach_into_what_was_cut_away(folder: LogFolder) -> None:
    write(folder, "".join(f"{number:08}\n" for number in range(13)))
    folder.trim([A1])
    write(folder, "end\n")
    assert rest(folder, folder.before_end(A1, 3))[0] == "00000011\n00000012\nend\n"


def test_an_instance_is_found_by_its_name_and_by_nothing_else(folder: LogFolder, tmp_path: Path) -> None:
    (tmp_path.parent / "secret-1.log").write_text("secret")
    write(folder, "one\n")
    newest = InstanceId(LOCAL, ModelName("a"), 12)
    write(folder, "two\n", newest)
    assert folder.find("a-1") == A1
    assert folder.newest(ModelName("a")) == newest
    for name in ("a", "a-2", "../secret-1", "a-1.log", "", "/a-1", "a-01"):
        assert folder.find(name) is None
    assert folder.newest(ModelName("b")) is None
