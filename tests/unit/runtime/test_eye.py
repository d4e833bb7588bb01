"""The eye on the config: what is read again, and what its dates tell without."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offloadd.runtime import eye
from offloadd.runtime.eye import Eye


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every reading of the content."""
    found: list[Path] = []
    real = eye.read_sources

    def noted(path: Path) -> object:
        found.append(path)
        return real(path)

    monkeypatch.setattr(eye, "read_sources", noted)
    return found


def known(subject: Eye) -> bytes:
    """The content's digest, once the eye takes it for granted."""
    sight = subject.look()
    assert sight is not None
    for _ in range(3):
        assert subject.look(sight.digest) is None
    return sight.digest


def aged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had been written long ago: the date of the last change of all cannot be set, but what is long ago can."""
    path.write_text("models: {}")
    monkeypatch.setattr(eye, "_BLURRED_NS", -60_000_000_000)


def test_what_was_written_long_ago_is_not_read_again(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "offloadd.yaml"
    aged(path, monkeypatch)
    subject = Eye(path)
    digest = known(subject)
    assert len(reads) == 2  # the second one shows that the dates are this content's
    assert subject.look(digest) is None
    assert subject.look(b"another") is not None
    assert len(reads) == 3


def test_what_was_written_just_now_is_read_again_each_time(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "offloadd.yaml"
    path.write_text("models: {}")
    known(Eye(path))
    assert len(reads) == 4


def rewritten(path: Path) -> None:
    """The same size, and the same date of change as far as a program can set it."""
    about = path.stat()
    path.write_text("models: []")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_name("new").write_text("models: []")
    path.with_name("new").rename(path)


def made_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "it is written": lambda path: path.write_text("models: {a: {source: /x.gguf}}"),
    "it is written with its date put back": rewritten,
    "it is replaced": replaced,
    "it is gone": Path.unlink,
    "it is a folder": made_unreadable,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_it_is_seen_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]) -> None:
    path = tmp_path / "offloadd.yaml"
    aged(path, monkeypatch)
    subject = Eye(path)
    digest = known(subject)
    time.sleep(0.02)  # the kernel's dates are as fine as its clock ticks; a change within one is what _BLURRED_NS is for
    change(path)
    sight = subject.look(digest)
    assert sight is not None
    assert sight.digest != digest


def test_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]) -> None:
    aged(tmp_path / "a.yaml", monkeypatch)
    (tmp_path / "b.yaml").write_text("{}")
    subject = Eye(tmp_path)
    digest = known(subject)
    assert len(reads) == 2
    for change in (lambda: (tmp_path / "b.yaml").write_text("models: {}"), lambda: (tmp_path / "c.yaml").write_text("{}")):
        time.sleep(0.02)
        change()
        sight = subject.look(digest)
        assert sight is not None
        digest = sight.digest
        assert known(subject) == digest


def test_a_link_that_leads_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        aged(tmp_path / name, monkeypatch)
    (tmp_path / "two").write_text("models: []")
    path = tmp_path / "offloadd.yaml"
    path.symlink_to("one")
    subject = Eye(path)
    digest = known(subject)
    (tmp_path / "fresh").symlink_to("two")
    (tmp_path / "fresh").rename(path)
    assert subject.look(digest) is not None


def test_one_that_is_not_there_is_looked_for_each_time(tmp_path: Path, reads: list[Path]) -> None:
    subject = Eye(tmp_path / "offloadd.yaml")
    known(subject)
    assert len(reads) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_in_a_folder_that_becomes_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(tmp_path / "a.yaml", monkeypatch)
    (tmp_path / "a.yaml").chmod(0)
    subject = Eye(tmp_path)
    digest = known(subject)
    (tmp_path / "a.yaml").chmod(0o600)
    assert subject.look(digest) is not None


def test_what_cannot_be_read_is_tried_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]) -> None:
    monkeypatch.setattr(eye, "_BLURRED_NS", -60_000_000_000)
    (tmp_path / "a.yaml").write_bytes(b"\xff")  # why it cannot be read does not matter: its folder's date will not tell when it can
    known(Eye(tmp_path))
    assert len(reads) == 4
