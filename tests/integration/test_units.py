"""The shipped units, read by systemd itself: this machine's version and newer ones."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.systemds import UNITS, Systemd, installed, newer, staged

EXPOSURE = 22
"""The most that the service may be exposed, in tenths, as `systemd-analyze security` counts."""
_ARGUED = {
    "PrivateDevices", "ProtectControlGroups", "MemoryDenyWriteExecute", "ProcSubset", "PrivateUsers", "PrivateNetwork",
    "IPAddressDeny", "RestrictAddressFamilies=~AF_NETLINK", "SystemCallFilter=~@resources",
}  # fmt: skip
"""What other services lock and this one cannot: each has its reason in the unit."""

everywhere = pytest.mark.parametrize("find", [installed, lambda: newer(254), lambda: newer(257)], ids=["own", "254", "257"])


def verify(systemd: Systemd, folder: Path) -> subprocess.CompletedProcess[str]:
    units = sorted([*folder.glob("*.service"), *folder.glob("*.socket")])
    return systemd.analyze("verify", "--recursive-errors=yes", "--man=no", *units)


@everywhere
def test_systemd_finds_nothing_wrong_with_the_units(find: Callable[[], Systemd], tmp_path: Path) -> None:
    systemd = find()
    said = verify(systemd, staged(tmp_path / "units", *(["notify-reload"] if systemd.version >= 254 else [])))
    assert (said.returncode, said.stderr) == (0, "")


@everywhere
@pytest.mark.parametrize("drop_in", ["kill-all", "offline", "engine-users"])
def test_systemd_finds_nothing_wrong_with_a_drop_in(find: Callable[[], Systemd], drop_in: str, tmp_path: Path) -> None:
    said = verify(find(), staged(tmp_path / "units", drop_in))
    assert (said.returncode, said.stderr) == (0, "")


@everywhere
def test_a_mistake_in_a_unit_would_be_found(find: Callable[[], Systemd], tmp_path: Path) -> None:
    folder = staged(tmp_path / "units")
    unit = folder / "ml-offload-api.service"
    unit.write_text(unit.read_text().replace("OOMPolicy=continue", "OOMPolice=continue"))
    said = verify(find(), folder)
    assert said.returncode == 1
    assert "OOMPolice" in said.stderr


def test_notify_reload_is_for_newer_ones_only(tmp_path: Path) -> None:
    systemd = installed()
    if systemd.version >= 254:
        pytest.skip("this machine's systemd knows it")
    assert verify(systemd, staged(tmp_path / "units", "notify-reload")).returncode == 1


@everywhere
def test_exposure_stays_low(find: Callable[[], Systemd], tmp_path: Path) -> None:
    unit = staged(tmp_path / "units") / "ml-offload-api.service"
    said = find().analyze("security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", unit)
    assert said.returncode == 0, said.stdout + said.stderr
    assert (found := re.search(r"Overall exposure level for ml-offload-api.service: ([\d.]+)", said.stdout)), said.stdout
    assert 0 < float(found[1]) <= EXPOSURE / 10


def test_every_lock_that_is_left_open_has_its_reason_in_the_unit(tmp_path: Path) -> None:
    text = (UNITS / "ml-offload-api.service").read_text()
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    unit = staged(tmp_path / "units") / "ml-offload-api.service"
    said = installed().analyze("security", "--offline=true", "--no-pager", unit).stdout
    opened = {line.split()[1].rstrip("=") for line in said.splitlines() if line.startswith("✗")}
    assert opened >= _ARGUED, "some of these are locked after all: take them off the list"
    for lock in _ARGUED:
        assert lock.rpartition("~")[2].partition("=")[0] in comments, f"why is {lock} open?"


def test_users_and_folders_are_made_as_systemd_reads_them(tmp_path: Path) -> None:
    for program, kind in (("systemd-sysusers", "sysusers.d"), ("systemd-tmpfiles", "tmpfiles.d")):
        root = tmp_path / kind
        (root / "etc").mkdir(parents=True)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\nvideo:x:44:\n")
        users = ["systemd-sysusers", f"--root={root}", str(UNITS / "sysusers.d/ml-offload.conf")]
        command = (
            users
            if program == "systemd-sysusers"
            else [program, "--create", f"--root={root}", str(UNITS / "tmpfiles.d/ml-offload.conf")]
        )
        try:
            subprocess.run(users, check=True, capture_output=True, timeout=30)
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        except FileNotFoundError as missing:
            pytest.skip(f"{missing.filename} is not installed here")
    groups = dict(line.split(":x:") for line in (tmp_path / "sysusers.d/etc/group").read_text().splitlines())
    for name in ("video", "render", "ml-models"):
        assert groups[name].endswith("ml-offload"), groups
    models = tmp_path / "tmpfiles.d/var/lib/ml-models"
    assert models.stat().st_mode & 0o7777 == 0o2775
