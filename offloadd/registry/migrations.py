"""The schema's history: numbered steps, each applied once and in a transaction. `PRAGMA user_version` counts them."""

from __future__ import annotations

from collections.abc import Callable

from peewee import SqliteDatabase

from offloadd.errors import PermanentError
from offloadd.registry.records import FootprintRecord


def _footprints(database: SqliteDatabase) -> None:
    database.create_tables([FootprintRecord])


STEPS: tuple[Callable[[SqliteDatabase], None], ...] = (_footprints,)


def migrate(database: SqliteDatabase) -> None:
    """Bring the schema up to date; PermanentError when it is newer than this program."""
    have = int(database.execute_sql("PRAGMA user_version").fetchone()[0])
    if have > len(STEPS):
        message = f"the registry has schema {have}, and this offloadd knows {len(STEPS)}"
        raise PermanentError(message, hint="start the newer offloadd that wrote it, or move the file away")
    for number, step in enumerate(STEPS[have:], have + 1):
        with database.atomic("IMMEDIATE"):
            step(database)
            database.execute_sql(f"PRAGMA user_version = {number}")
