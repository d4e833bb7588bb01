"""The schema's history: numbered steps, each applied once and in a transaction of its own.

Written as SQL that SQLite and PostgreSQL both take, so that a step stays what it was when the records change. SQLite counts them in
`PRAGMA user_version`, PostgreSQL in a table.
"""

from __future__ import annotations

from pathlib import Path

from peewee import Database, SqliteDatabase

from offloadd.errors import PermanentError

_FOOTPRINTS = (
    "CREATE TABLE footprint (key VARCHAR(255) NOT NULL PRIMARY KEY, model VARCHAR(255) NOT NULL, backend VARCHAR(255) NOT NULL,"
    " peak_bytes BIGINT NOT NULL, samples INTEGER NOT NULL, load_seconds DOUBLE PRECISION, seen_at DOUBLE PRECISION NOT NULL)",
    "CREATE INDEX footprint_seen_at ON footprint (seen_at)",
)
_FOUND_AND_HISTORY = (
    "CREATE TABLE found (host VARCHAR(255) NOT NULL, path TEXT NOT NULL, name VARCHAR(255) NOT NULL, content VARCHAR(255) NOT NULL,"
    " body TEXT NOT NULL, gone BOOLEAN NOT NULL, seen_at DOUBLE PRECISION NOT NULL, PRIMARY KEY (host, path))",
    "CREATE TABLE load (id {id}, model VARCHAR(255) NOT NULL, backend VARCHAR(255) NOT NULL, host VARCHAR(255) NOT NULL,"
    " at DOUBLE PRECISION NOT NULL, seconds DOUBLE PRECISION NOT NULL, size_bytes BIGINT)",
    "CREATE INDEX load_model_at ON load (model, at)",
    "CREATE TABLE ending (id {id}, model VARCHAR(255) NOT NULL, backend VARCHAR(255) NOT NULL, host VARCHAR(255) NOT NULL,"
    " instance VARCHAR(255) NOT NULL, at DOUBLE PRECISION NOT NULL, kind VARCHAR(255) NOT NULL, message TEXT NOT NULL,"
    " expected BOOLEAN NOT NULL, ready_seconds DOUBLE PRECISION, peak_bytes BIGINT)",
    "CREATE INDEX ending_model_at ON ending (model, at)",
    "CREATE TABLE usage (model VARCHAR(255) NOT NULL, day VARCHAR(10) NOT NULL, answered BIGINT NOT NULL, refused BIGINT NOT NULL,"
    " cancelled BIGINT NOT NULL, failed BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,"
    " completion_tokens BIGINT NOT NULL, seconds DOUBLE PRECISION NOT NULL, PRIMARY KEY (model, day))",
)

STEPS: tuple[tuple[str, ...], ...] = (_FOOTPRINTS, _FOUND_AND_HISTORY)

_LOCK = 0x0FF10ADD
"""Of PostgreSQL's advisory locks: two daemons that start at once migrate one after the other."""


def migrate(database: Database, backup: Path | None = None) -> None:
    """Bring the schema up to date; PermanentError when it is newer than this program.

    `backup` is the SQLite file; before the first step that changes what is there, a copy of it is made beside it. A PostgreSQL
    server's backups are its administrator's.
    """
    is_file = isinstance(database, SqliteDatabase)
    have = _version(database)
    if have > len(STEPS):
        raise _newer(have)
    if backup is not None and 0 < have < len(STEPS):
        _copy(database, backup.with_name(f"{backup.name}.schema-{have}"))
    for number in range(have + 1, len(STEPS) + 1):
        with database.atomic("IMMEDIATE") if is_file else database.atomic():
            if not is_file:
                database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            if _version(database) < number:  # or another daemon has just done it
                _apply(database, number)


def _apply(database: Database, number: int) -> None:
    is_file = isinstance(database, SqliteDatabase)
    key = "INTEGER NOT NULL PRIMARY KEY" if is_file else "BIGSERIAL PRIMARY KEY"
    for statement in STEPS[number - 1]:
        database.execute_sql(statement.format(id=key))
    if is_file:
        database.execute_sql(f"PRAGMA user_version = {number}")
    else:
        database.execute_sql("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        database.execute_sql("DELETE FROM schema_version")
        database.execute_sql("INSERT INTO schema_version VALUES (%s)", (number,))


def _version(database: Database) -> int:
    if isinstance(database, SqliteDatabase):
        return int(database.execute_sql("PRAGMA user_version").fetchone()[0])
    if not database.table_exists("schema_version"):
        return 0
    row = database.execute_sql("SELECT version FROM schema_version").fetchone()
    return int(row[0]) if row else 0


def _copy(database: Database, to: Path) -> None:
    to.unlink(missing_ok=True)
    database.execute_sql("VACUUM INTO ?", (str(to),))


def _newer(have: int) -> PermanentError:
    message = f"the registry has schema {have}, and this offloadd knows {len(STEPS)}"
    return PermanentError(message, hint="start the newer offloadd that wrote it, or move it away")
