"""A folder of its own for each launch: whose it is, where it lies, and that nothing else is taken away with it."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.accounts import Account, AccountError, find_account, step_to
from offloadd.runtime.launchers import folders as subject
from offloadd.runtime.launchers.folders import LONGEST, ROOM, Folders

MARK = "a-1@cafe"


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short one that everybody may enter: pytest's own are neither."""
    path = Path(tempfile.mkdtemp(prefix="o-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def made(folders: Folders, mark: str = MARK, account: Account | None = None) -> Path:
    found = folders.make(mark, account)
    assert found is not None
    return found


@pytest.fixture
def nobody() -> Account:
    try:
        found = find_account("nobody")
        step_to(found)
    except AccountError as error:
        pytest.skip(error.message)
    assert found is not None
    return found


def test_it_lies_in_the_data_folder_and_is_closed_to_others(home: Path) -> None:
    folder = made(Folders(home))
    assert folder.parent == home / "tmp"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert made(Folders(home), "a-2@beef") != folder


def test_it_goes_with_all_that_is_in_it_and_others_stay(home: Path) -> None:
    folders = Folders(home)
    folder, other = made(folders), made(folders, "b-1@f00")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "1ca15e1f-823e-4f24-afff-d0d0c15dcdcb"))
    (folder / "deep" / "er").mkdir(parents=True)
    outside = home / "outside"
    outside.write_text("of somebody")
    (folder / "link").symlink_to(outside)
    (folder / "up").symlink_to(home)
    folders.remove(MARK)
    assert not folder.exists()
    assert outside.read_text() == "of somebody"
    assert other.is_dir()
    folders.remove(MARK)  # it is gone


def test_what_belongs_to_no_living_launch_is_swept_away(home: Path) -> None:
    folder, other = made(Folders(home)), made(Folders(home), "b-1@f00")
    (home / "tmp" / "of-somebody").mkdir()
    Folders(home).sweep({MARK})
    assert folder.is_dir()
    assert not other.exists()
    assert (home / "tmp" / "of-somebody").is_dir()


def test_one_is_taken_away_by_its_path_only_if_it_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was written down by a daemon that was told another place for temporary files."""
    (home / "elsewhere").mkdir()
    monkeypatch.setenv("TMPDIR", str(home / "elsewhere"))
    folder = made(Folders(home))
    assert folder.is_relative_to(home / "elsewhere")
    monkeypatch.delenv("TMPDIR")
    for path in ("", str(home), str(home / "elsewhere"), "/"):
        Folders(home).discard(path)
    assert folder.is_dir()
    Folders(home).discard(str(folder))
    assert not folder.exists()


def test_a_path_without_room_for_a_sockets_name_is_not_chosen(home: Path) -> None:
    deep = home / ("d" * 60)
    deep.mkdir()
    folders = Folders(deep)
    folder = made(folders)
    try:
        assert not folder.is_relative_to(deep)
        with socket.socket(socket.AF_UNIX) as longest:
            longest.bind(str(folder / ("s" * ROOM)))
        assert len(str(folder)) + 1 + ROOM <= LONGEST
    finally:
        folders.remove(MARK)
        folders.close()
    assert not folder.parent.exists()


def test_a_folder_that_somebody_else_has_put_there_is_not_used(home: Path, nobody: Account) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (home / "tmp").symlink_to(elsewhere)
    folders = Folders(home)
    folder = made(folders)
    assert not folder.is_relative_to(home)
    folders.remove(MARK)
    (home / "tmp").unlink()
    (home / "tmp").mkdir()
    os.chown(home / "tmp", nobody.uid, nobody.gid)
    assert not made(folders).is_relative_to(home)
    (home / "tmp" / "0123456789ab").mkdir()
    folders.sweep(frozenset())
    assert (home / "tmp" / "0123456789ab").is_dir(), "not ours, so not ours to take away"
    folders.close()


def test_another_users_is_his_and_goes_as_him(home: Path, nobody: Account) -> None:
    folders = Folders(home)
    folder = made(folders, account=nobody)
    assert folder.is_relative_to(home / "tmp")
    found = folder.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (nobody.uid, 0o700)
    assert folder.parent.stat().st_uid == os.geteuid()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o711
    (folder / "file").write_text("x")
    os.chown(folder / "file", nobody.uid, nobody.gid)
    folders.remove(MARK)
    assert list((home / "tmp").iterdir()) == []


def test_where_that_user_may_not_go_another_place_is_chosen(home: Path, nobody: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = home / "run"
    data = home / "data"
    runtime.mkdir()
    data.mkdir(mode=0o750)
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(runtime))
    folders = Folders(data)
    assert made(folders, account=nobody).is_relative_to(runtime)
    assert made(folders, "b-1@f00").is_relative_to(data)
    folders.sweep(frozenset())
    folders.close()
    assert not (runtime / "tmp").exists()
    assert not (data / "tmp").exists()


def test_where_none_can_be_made_there_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LONGEST", 10)
    assert Folders(home).make(MARK, None) is None
