"""A real PostgreSQL server for the time of a test session, on a UNIX socket in a folder of its own. Debian's package has it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_USER = "postgres"
_START_S = 60.0
_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "16MB",
    "max_connections": "20",
    "max_worker_processes": "0",
    "max_parallel_workers": "0",
    "autovacuum": "off",
    "fsync": "off",
    "dynamic_shared_memory_type": "mmap",
}


@dataclass(slots=True)
class Postgres:
    """One server; each test takes a database of its own."""

    programs: Path
    folder: Path
    process: subprocess.Popen[bytes]

    def url(self, database: str = _USER) -> str:
        return f"postgresql://{_USER}:unused-secret@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Its URL."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def sql(self, statement: str, database: str = _USER) -> None:
        import psycopg

        with contextlib.closing(psycopg.connect(self.url(database), autocommit=True)) as connection:
            connection.execute(statement)

    def stop(self) -> None:
        """As a crash or an administrator does: everybody is thrown out."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)

    def start(self) -> None:
        self.process = _start(self.programs, self.folder)


def find_programs() -> Path | str:
    """The folder of the server's programs, or why there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not found:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and _user() is None:
        return f"PostgreSQL does not run as root, and there is no user {_USER}"
    return found[-1].parent


@contextlib.contextmanager
def server() -> Iterator[Postgres]:
    """A running server, from nothing to nothing; skips with its reason where there is none."""
    programs = find_programs()
    if isinstance(programs, str):
        pytest.skip(programs)
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    folder = Path(tempfile.mkdtemp(prefix="offloadd-pg-", dir="/tmp"))  # short: a UNIX socket's path has 107 bytes
    try:
        if os.getuid() == 0:
            account = _user()
            assert account is not None
            os.chown(folder, account.pw_uid, account.pw_gid)
        _run(programs / "initdb", "-D", str(folder / "data"), "-U", _USER, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        running = Postgres(programs, folder, _start(programs, folder))
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(programs: Path, folder: Path) -> subprocess.Popen[bytes]:
    settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
    argv = [str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder), *settings]
    with (folder / "log").open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **_as_user())  # type: ignore[call-overload]
    deadline = time.monotonic() + _START_S
    while "ready to accept connections" not in (folder / "log").read_bytes()[begin:].decode(errors="replace"):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return process


def _run(*argv: object) -> None:
    words = [str(part) for part in argv]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, **_as_user())  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr


def _user() -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(_USER)
    return None


def _as_user() -> dict[str, object]:
    account = _user() if os.getuid() == 0 else None
    common: dict[str, object] = {"cwd": "/"}
    return common if account is None else {**common, "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
