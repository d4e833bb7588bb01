"""A real systemd as process 1 of namespaces of its own, over a throw-away copy of this machine's files: nothing outside sees it."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.servers import Reply, until

_SYSTEMD = Path("/lib/systemd/systemd")
_LIFE_S = 300
"""It is killed after so long, whatever becomes of the test."""
_BOOT = """\
set -e
mount --make-rprivate /
mount --make-rshared /                       # without this, LoadCredential= comes up empty
R=$W/root
mkdir -p $R $W/layers
mount -t tmpfs layers $W/layers
mkdir $W/layers/upper $W/layers/work
mount -t overlay root -o lowerdir=/,upperdir=$W/layers/upper,workdir=$W/layers/work $R
if [ -n "$TREE" ]; then for part in lib bin usr/lib usr/bin; do cp -a $TREE/$part/. $R/$part/; done; fi
mount -t proc proc $R/proc
mount --bind $R/proc/sys $R/proc/sys
mount -o remount,ro,bind $R/proc/sys
mount -t tmpfs run $R/run
mount -t tmpfs dev $R/dev
for name in null zero full random urandom tty; do touch $R/dev/$name; mount --bind /dev/$name $R/dev/$name; done
mkdir $R/dev/shm
touch $R/dev/console
mount -t sysfs -o ro sys $R/sys
mount -t tmpfs fs $R/sys/fs
mkdir $R/sys/fs/cgroup
mount -t cgroup2 cgroup $R/sys/fs/cgroup
ip link set lo up
mkdir $R/run/units
for name in idle sysinit basic shutdown sockets multi-user; do
  printf '[Unit]\\nDescription=Nothing to do\\nDefaultDependencies=no\\n' >$R/run/units/$name.target
done
cp /lib/systemd/system/systemd-journald.s* $R/run/units
export container=offloadd-test SYSTEMD_UNIT_PATH=/run/units
drop=-sys_time,-sys_boot,-sys_module,-syslog,-sys_rawio
set -- /lib/systemd/systemd --system --unit=idle.target --log-target=journal-or-kmsg
exec setpriv --bounding-set $drop --inh-caps $drop chroot $R "$@"
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine inside."""

    pid: int
    """Of its process 1, as seen from outside."""

    @property
    def root(self) -> Path:
        """Its files, from outside."""
        return Path(f"/proc/{self.pid}/root")

    def run(self, *command: str, within_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-i", "-u", "-n", "-C", "-r", "-w"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=within_s, check=False)

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", "--no-pager", *arguments, within_s=120)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", unit, "--value", "-p", name).stdout.strip()

    def journal(self, *arguments: str) -> str:
        """What its journal holds."""
        return self.run("journalctl", "--no-pager", *arguments).stdout

    def ask(self, method: str, path: str, body: bytes | None = None, timeout: float = 60) -> Reply:
        """A request to the API over its UNIX socket, from outside."""
        with contextlib.closing(_UnixConnection(self.root / "run/offloadd/api.sock", timeout)) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def processes(self) -> dict[int, str]:
        """Its processes by their numbers in it, with their command lines."""
        found = {}
        for entry in (self.root / "proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def open_way(self, path: Path) -> None:
        """Let its users reach a path that only root can reach outside."""
        for folder in path.resolve().parents:
            inside = self.root / folder.relative_to("/")
            if inside.stat().st_mode & 0o005 != 0o005:
                inside.chmod(inside.stat().st_mode | 0o055)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def booted(folder: Path, tree: Path | None = None) -> Iterator[Machine]:
    """Start one, and take it away with all that it runs; skips the test, and says why, where this machine cannot do it.

    `tree` holds another systemd's files, which are laid over this machine's.
    """
    group = _group()
    log = folder / "boot.log"
    try:
        with log.open("wb") as out:
            starter = subprocess.Popen(
                ["timeout", "-s", "KILL", str(_LIFE_S), "unshare", "-mpfiunC", "--mount-proc", "--kill-child", "sh", "-c", _BOOT],
                env={**os.environ, "W": str(folder), "TREE": str(tree or "")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=lambda: (group / "cgroup.procs").write_text("0"),
            )
        try:
            yield _awaken(group, starter, log)
        finally:
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")
            starter.kill()
            starter.wait()
    finally:
        _remove(group)


def _awaken(group: Path, starter: subprocess.Popen[bytes], log: Path) -> Machine:
    def up() -> Machine | None:
        if starter.poll() is not None:
            pytest.skip(f"no systemd can be started here: {log.read_text(errors='replace')[-300:]}")
        scope = group / "init.scope/cgroup.procs"
        found = scope.read_text().split() if scope.exists() else []
        machine = Machine(int(found[0])) if found else None
        return machine if machine and machine.systemctl("is-system-running").stdout.strip() in ("running", "degraded") else None

    try:
        return until(up, "systemd is up", 30)
    except AssertionError as problem:
        pytest.skip(f"no systemd can be started here: {problem}")


def _group() -> Path:
    """A control group of our own."""
    if os.geteuid() != 0 or not _SYSTEMD.exists() or shutil.which("unshare") is None:
        pytest.skip("a systemd of its own needs root, systemd and unshare")
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [Path(words[4]) for words in mounts if "cgroup2" in words[words.index("-") :]]
    if not points:
        pytest.skip("a systemd of its own needs control groups of version 2")
    try:
        group = Path(tempfile.mkdtemp(prefix="offloadd-test-", dir=points[0]))
        group.chmod(0o755)  # its users look at their own groups below it
    except OSError as problem:
        pytest.skip(f"a systemd of its own needs a control group: {problem}")
    return group


def _remove(group: Path) -> None:
    def gone() -> bool:
        folders = sorted((path for path in group.rglob("*") if path.is_dir()), key=lambda path: len(path.parts), reverse=True)
        with contextlib.suppress(OSError):
            for folder in [*folders, group]:
                folder.rmdir()
        return not group.exists()

    until(gone, "its control groups are gone", 15)
