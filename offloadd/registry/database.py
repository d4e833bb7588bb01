"""Opening the registry's database: a SQLite file of this daemon's own, or a PostgreSQL server that several daemons share."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peewee import Database, DatabaseError, ImproperlyConfigured, OperationalError, PostgresqlDatabase, SqliteDatabase

from offloadd.errors import PermanentError
from offloadd.registry.migrations import migrate

_PRAGMAS = {"busy_timeout": 5000, "journal_mode": "wal", "synchronous": "full"}
_SERVER_OPTIONS = "-c statement_timeout=10000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=30000"
_PASSWORD = re.compile(r"(?<=:)[^/@:]*(?=@)|(?<=[?&]password=)[^&]*")
_SUFFIXES = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registry is: a file's path, or the URL of a server."""

    file: Path | None = None
    url: str = ""

    def __str__(self) -> str:
        return str(self.file) if self.file else _PASSWORD.sub("***", self.url)


class DamagedError(Exception):
    """The file is there and is no sound database."""


def open_database(place: Place) -> Database:
    """Connect, check and migrate. DamagedError, PermanentError for a newer schema, OperationalError when it cannot be used now."""
    return _open_file(place.file) if place.file else _open_server(place.url)


def set_aside(path: Path) -> Path:
    """Move a damaged file and its parts out of the way; where it is now. Raises OSError."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-more")
    for suffix in _SUFFIXES:
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside


def is_damage(error: DatabaseError) -> bool:
    """Whether the file itself is at fault, rather than the disk, a lock or the server."""
    text = str(error)
    return "malformed" in text or "not a database" in text


def _open_file(path: Path) -> Database:
    is_new = not path.exists()
    if not is_new and not path.stat().st_size:
        raise DamagedError("it is empty")
    database = SqliteDatabase(str(path), pragmas=_PRAGMAS, check_same_thread=False, thread_safe=False)
    try:
        database.connect()
        verdict = database.execute_sql("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise DamagedError(verdict)
        migrate(database, path)
    except OperationalError:
        database.close()
        if is_new:
            _remove_begun(path)
        raise
    except DatabaseError as error:
        database.close()
        raise DamagedError(str(error)) from error
    except BaseException:
        database.close()
        raise
    return database


def _remove_begun(path: Path) -> None:
    """What a full disk left of a new file is no damaged registry."""
    for suffix in _SUFFIXES:
        with suppress(OSError):
            path.with_name(path.name + suffix).unlink()


def _open_server(url: str) -> Database:
    try:
        database = PostgresqlDatabase(
            url,
            prefer_psycopg3=True,
            thread_safe=False,
            connect_timeout=5,
            options=_SERVER_OPTIONS,
            keepalives_idle=30,
            application_name="offloadd",
        )
        database.connect()
    except ImproperlyConfigured as error:
        hint = "install it with pip install 'offloadd[postgres]'"
        raise PermanentError("storage.registry is a PostgreSQL URL, and the driver psycopg is not installed", hint=hint) from error
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database
