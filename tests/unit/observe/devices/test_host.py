from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from offloadd.observe.devices.host import HostReader
from offloadd.observe.devices.ram import Ram
from offloadd.state.ids import HOST_RAM

GIB = 2**30
MACHINE = Ram(64 * GIB, 40 * GIB)
UNLIMITED_V1 = 9223372036854771712


class Tree:
    """/proc/self/cgroup and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.cgroups = root / "cgroup"
        self.membership = root / "membership"
        self.cgroups.mkdir()
        self.member("0::/")

    def member(self, *lines: str) -> None:
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, stat: str = "", **files: object) -> None:
        """Write files of a group; `_` in their names stands for the first dot."""
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")
        if stat:
            (folder / "memory.stat").write_text(stat)

    def read(self) -> tuple[int, int]:
        (view,) = HostReader(cgroups=self.cgroups, membership=self.membership, machine=lambda: MACHINE).read()
        return view.total, view.free


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_machine_itself():
    (view,) = HostReader().read()
    assert view.id == HOST_RAM
    assert 0 < view.free <= view.total <= psutil.virtual_memory().total
    assert 0 <= view.utilization <= 1


def test_no_limits(tree):
    tree.member("0::/user.slice")
    tree.group("user.slice", memory_max="max", memory_current=GIB)
    assert tree.read() == MACHINE


def test_no_cgroups_at_all(tree):
    tree.membership.unlink()
    assert tree.read() == MACHINE


def test_a_limit_of_the_group(tree):
    tree.member("0::/system.slice/offloadd.service")
    tree.group("system.slice/offloadd.service", memory_max=16 * GIB, memory_current=6 * GIB)
    assert tree.read() == (16 * GIB, 10 * GIB)


def test_limits_of_parents_count_with_all_that_is_used_under_them(tree):
    tree.member("0::/a/b/c")
    tree.group("a", memory_max=32 * GIB, memory_current=30 * GIB)
    tree.group("a/b", memory_max="max", memory_current=GIB)
    tree.group("a/b/c", memory_max=16 * GIB, memory_current=GIB)
    assert tree.read() == (16 * GIB, 2 * GIB)


def test_page_cache_that_was_charged_can_be_had(tree):
    tree.member("0::/a")
    stat = f"anon {2 * GIB}\nfile {8 * GIB}\ninactive_file {5 * GIB}\nactive_file {2 * GIB}\nshmem {GIB}\n"
    tree.group("a", stat, memory_max=16 * GIB, memory_current=10 * GIB)
    assert tree.read() == (16 * GIB, 13 * GIB)


def test_the_soft_limit_is_a_limit(tree):
    tree.member("0::/a")
    tree.group("a", memory_max=16 * GIB, memory_high=12 * GIB, memory_current=2 * GIB)
    assert tree.read() == (12 * GIB, 10 * GIB)


def test_a_limit_beyond_the_machine_changes_nothing(tree):
    tree.member("0::/a")
    tree.group("a", memory_max=500 * GIB, memory_current=GIB)
    assert tree.read() == MACHINE


def test_more_used_than_allowed_leaves_nothing(tree):
    tree.member("0::/a")
    tree.group("a", memory_max=4 * GIB, memory_current=5 * GIB)
    assert tree.read() == (4 * GIB, 0)


def test_the_machine_may_have_less_than_the_limit_leaves(tree):
    tree.member("0::/a")
    tree.group("a", memory_max=60 * GIB, memory_current=GIB)
    assert tree.read() == (60 * GIB, 40 * GIB)


@pytest.mark.parametrize("path", ["/docker/0123", "/../../outside"])
def test_in_a_container_the_mount_is_the_group(tree, path):
    tree.member(f"0::{path}")
    tree.group("", memory_max=8 * GIB, memory_current=3 * GIB)
    assert tree.read() == (8 * GIB, 5 * GIB)


def test_nothing_outside_the_mount_is_read(tree):
    tree.member("0::/../beside")
    tree.group("../beside", memory_max=GIB, memory_current=0)
    assert tree.read() == MACHINE


def test_the_first_version(tree):
    tree.member("9:name=systemd:/", "4:cpu,memory:/a/b", "0::/")
    tree.group("memory", memory_limit_in_bytes=UNLIMITED_V1, memory_usage_in_bytes=30 * GIB)
    tree.group("memory/a", memory_limit_in_bytes=16 * GIB, memory_usage_in_bytes=9 * GIB)
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}\n"
    tree.group("memory/a", stat)
    tree.group("memory/a/b", memory_limit_in_bytes=UNLIMITED_V1, memory_usage_in_bytes=GIB)
    assert tree.read() == (16 * GIB, 10 * GIB)


@pytest.mark.parametrize("text", ["", "nonsense", "0:", "::"])
def test_a_file_of_another_shape_limits_nothing(tree, text):
    tree.member(text)
    tree.group("", memory_max="lots", memory_current="?")
    assert tree.read() == MACHINE
