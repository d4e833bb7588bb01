"""Control groups as far as files tell: which part of the tree is ours, what a group's books say."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.runtime.launchers import cgroups
from offloadd.runtime.launchers.cgroups import Group, GroupEvidence, delegated
from offloadd.units import Bytes


def kernel(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, *, controllers: str = "", mounted: bool = True) -> Path:
    """A tree of version 2 in which we are in `own`; its folder there."""
    tree = folder / "tree"
    for path in (tree, *(tree / part for part in (Path(own.lstrip("/")), *Path(own.lstrip("/")).parents))):
        path.mkdir(parents=True, exist_ok=True)
        (path / "cgroup.procs").touch()
        (path / "cgroup.controllers").write_text(controllers)
        (path / "cgroup.subtree_control").touch()
    me = folder / "self"
    me.mkdir()
    (me / "cgroup").write_text(f"12:cpu:/\n0::{own}\n")
    line = f"41 31 0:38 / {tree} rw,relatime - cgroup2 cgroup2 rw" if mounted else "41 31 0:38 / /x rw - tmpfs tmpfs rw"
    (me / "mountinfo").write_text(f"38 31 0:35 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n{line}\n")
    monkeypatch.setattr(cgroups, "_SELF", me)
    real_mkdir = Path.mkdir

    def mkdir(path: Path, *args: object, **named: object) -> None:
        """As the kernel does it: a new group has its files."""
        real_mkdir(path, *args, **named)  # type: ignore[arg-type]
        if path.is_relative_to(tree) and not (path / "cgroup.procs").exists():
            (path / "cgroup.procs").touch()

    def rmdir(path: Path) -> None:
        for file in list(path.iterdir()) if path.is_relative_to(tree) else []:
            file.unlink()
        real_rmdir(path)

    real_rmdir = Path.rmdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    return tree / own.lstrip("/")


def test_groups_are_made_below_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernel(tmp_path, monkeypatch, "/system.slice/offloadd.service")
    groups = delegated(tmp_path / "data")
    assert groups is not None
    made = groups.of("a-1@cafe").path
    assert made.parent.parent == own
    assert made.name == "a-1@cafe"


def test_a_group_of_our_own_below_a_delegated_one_is_left_for_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `DelegateSubgroup=main`."""
    own = kernel(tmp_path, monkeypatch, "/system.slice/offloadd.service/main")
    groups = delegated(tmp_path / "data")
    assert groups is not None
    assert groups.of("x").path.parent.parent == own.parent


def test_two_data_folders_have_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path, monkeypatch, "/s")
    one, other = delegated(tmp_path / "one"), delegated(tmp_path / "other")
    assert one is not None
    assert other is not None
    assert one.of("x").path != other.of("x").path


def test_without_version_2_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path, monkeypatch, "/s", mounted=False)
    assert delegated(tmp_path / "data") is None


def test_the_kernel_is_asked_to_count_memory_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernel(tmp_path, monkeypatch, "/s", controllers="cpu memory pids")
    groups = delegated(tmp_path / "data")
    assert groups is not None
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    assert (groups.of("x").path.parent / "cgroup.subtree_control").read_text() == "+memory"


def test_a_mark_makes_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path, monkeypatch, "/s")
    groups = delegated(tmp_path / "data")
    assert groups is not None
    assert groups.of("../../x@1").path.parent == groups.of("y").path.parent


def test_a_groups_books(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n")
    (tmp_path / "memory.peak").write_text("3221225472\n")
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (tmp_path / "cgroup.procs").write_text("12\n34\n")
    group = Group(tmp_path)
    assert group.evidence() == GroupEvidence(oom_kills=1, peak=Bytes(3221225472))
    assert group.populated
    assert group.pids() == [12, 34]


def test_a_group_without_the_controller_tells_nothing(tmp_path: Path) -> None:
    assert Group(tmp_path).evidence() == GroupEvidence()
    assert not Group(tmp_path).populated
