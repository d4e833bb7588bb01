"""Versions of systemd to check units against: the machine's own, and newer ones unpacked beside it without being installed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
_CACHE = Path(sys.prefix) / "systemd"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_NEWER: Mapping[int, tuple[str, Sequence[str]]] = {
    254: ("bookworm-backports", ("systemd", "libsystemd-shared")),
    257: ("trixie", ("systemd", "libsystemd-shared", "libsystemd0", "libc6", "libssl3t64")),
}
"""Debian's suite, and the packages that its systemd-analyze needs beside what the machine has."""


@dataclass(frozen=True, slots=True)
class Systemd:
    """One version's tools."""

    version: int
    tree: Path | None = None
    """Where it is unpacked; None is the machine's own."""

    def analyze(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run its systemd-analyze."""
        command, env = self._command("systemd-analyze")
        env = {**os.environ, "SYSTEMD_LOG_TARGET": "console", "NO_COLOR": "1", **env}
        return subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=60, check=False)

    def _command(self, program: str) -> tuple[list[str], dict[str, str]]:
        if self.tree is None:
            return [program], {}
        libraries = [self.tree / "usr/lib/x86_64-linux-gnu/systemd", self.tree / "lib/x86_64-linux-gnu/systemd"]
        loader = self.tree / "usr/lib64/ld-linux-x86-64.so.2"
        if not loader.exists():
            return [str(self.tree / "usr/bin" / program)], {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}
        # It is built for a newer C library, which comes with its own loader.
        libraries += [self.tree / "usr/lib/x86_64-linux-gnu", Path("/usr/lib/x86_64-linux-gnu")]
        return [str(loader), "--library-path", ":".join(map(str, libraries)), str(self.tree / "usr/bin" / program)], {}


@functools.cache
def installed() -> Systemd:
    """The machine's own; skips the test where there is none."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    shown = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return Systemd(int(shown.split()[1]))


@functools.cache
def newer(version: int) -> Systemd:
    """One that is downloaded, a few megabytes, and unpacked; skips the test where that cannot be done."""
    tree = _CACHE / str(version)
    if not (tree / "usr/bin/systemd-analyze").exists():
        try:
            _unpack(version, tree)
        except (OSError, subprocess.SubprocessError) as problem:
            shutil.rmtree(tree, ignore_errors=True)
            pytest.skip(f"systemd {version} cannot be fetched on this machine: {problem}")
    found = Systemd(version, tree)
    said = found.analyze("--version")
    if said.returncode != 0 or f"systemd {version}" not in said.stdout:
        pytest.skip(f"systemd {version} does not run on this machine: {said.stderr.strip()}")
    return found


def _unpack(version: int, tree: Path) -> None:
    unpack(tree, *_NEWER[version])


def unpack(tree: Path, suite: str, packages: Sequence[str]) -> None:
    """Fetch packages of a suite and unpack them into a folder; OSError or SubprocessError where that cannot be done."""
    work = tree.with_name(f"{tree.name}-{os.getpid()}")
    (work / "lists/partial").mkdir(parents=True)
    (work / "cache/archives/partial").mkdir(parents=True)
    (work / "debs").mkdir()
    try:
        (work / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_archive()} {suite} main\n")
        options = ["-qq", "-o", f"Dir::Etc::sourcelist={work}/sources.list", "-o", "Dir::Etc::sourceparts=-"]
        options += ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache", "-o", "APT::Sandbox::User=root"]
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=90, cwd=work / "debs")
        run(["apt-get", *options, "update"])
        run(["apt-get", *options, "download", *packages])
        for package in (work / "debs").iterdir():
            run(["dpkg", "-x", package, work / "tree"])
        tree.parent.mkdir(exist_ok=True)
        (work / "tree").rename(tree)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _archive() -> str:
    """Where the machine's own packages come from."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()
    found = [line.split()[0] for line in lines if line.endswith(" bookworm")]
    if not found:
        raise OSError("this is no Debian 12 with its own package lists")
    return found[0]


def staged(folder: Path, *drop_ins: str) -> Path:
    """The shipped units as an installation has them, with the commands of this environment; `drop_ins` are switched on."""
    folder.mkdir(exist_ok=True)
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        text = unit.read_text()
        for command in ("offloadd", "offloadctl"):
            text = text.replace(f"={command} ", f"={Path(sys.prefix)}/bin/{command} ")
        (folder / unit.name).write_text(text)
    extra = folder / "ml-offload-api.service.d"
    extra.mkdir(exist_ok=True)
    for name in drop_ins:
        shutil.copy(UNITS / "drop-ins" / f"{name}.conf", extra)
    return folder
