"""Typed reads and writes of the registry. Everything blocks: call it in a thread. One writer, so one lock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from peewee import DatabaseError, OperationalError, SqliteDatabase

from offloadd.events import EventKind, about
from offloadd.registry import records
from offloadd.registry.migrations import migrate
from offloadd.registry.records import FootprintRecord
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Footprint
from offloadd.units import Bytes, Seconds

log = logging.getLogger(__name__)

KEPT_FOOTPRINTS = 10_000
_MEMORY = Path(":memory:")
_PRAGMAS = {"busy_timeout": 5000, "journal_mode": "wal", "synchronous": "full"}


class Registry:
    """One SQLite file. A damaged one is set aside, never deleted: what it held is learned anew.

    One that cannot be used now (a full disk, a read-only folder, somebody who holds it) is left alone, and memory stands in for it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self.problem = ""
        """What is wrong with the registry now; empty when nothing is."""
        self._lasting = ""
        """What of that stays until the next start."""
        self._database = self._open(path)

    def footprints(self) -> dict[str, Footprint]:
        """Everything learned, by key."""
        with self._lock:
            return {row.key: _footprint(row) for row in FootprintRecord.select()}

    def learn(self, found: Mapping[str, Footprint], seen_at: float) -> bool:
        """Remember peaks; a higher one than known replaces it. `seen_at` is Unix seconds.

        False when it could not be done (a full disk, a locked file), which `problem` then explains: give it again later.
        """
        try:
            with self._lock, self._database.atomic("IMMEDIATE"):
                for key, footprint in found.items():
                    _keep_higher(key, footprint, seen_at)
                _prune()
        except DatabaseError as error:
            self.problem = f"the registry cannot be written: {error}"
            log.warning("%s", self.problem, extra=about(EventKind.REGISTRY_PROBLEM))
            return False
        self.problem = self._lasting
        return True

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _open(self, path: Path) -> SqliteDatabase:
        try:
            return _opened(path)
        except OperationalError as error:
            self.problem = self._lasting = (
                f"the registry {path} cannot be used, and what is learned is kept until the end only: {error}"
            )
            log.warning("%s", self._lasting, extra=about(EventKind.REGISTRY_PROBLEM))
            return _opened(_MEMORY)
        except DatabaseError as error:
            aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            said = about(EventKind.REGISTRY_PROBLEM)
            log.error("the registry %s is damaged (%s); set aside as %s, and begun anew", path, error, aside, extra=said)  # noqa: TRY400
            self.problem = f"the registry was damaged; the old file is {aside}"
            for suffix in ("", "-wal", "-shm"):
                part = path.with_name(path.name + suffix)
                if part.exists():
                    part.rename(aside.with_name(aside.name + suffix))
            return _opened(path)


def _opened(path: Path) -> SqliteDatabase:
    database = SqliteDatabase(str(path), pragmas=_PRAGMAS, check_same_thread=False, thread_safe=False)
    try:
        database.connect()
        verdict = database.execute_sql("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise DatabaseError(verdict)
        records.bind(database)
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _keep_higher(key: str, footprint: Footprint, seen_at: float) -> None:
    known = FootprintRecord.get_or_none(FootprintRecord.key == key)
    peak = max(footprint.peak, known.peak_bytes if known else 0)
    FootprintRecord.replace(
        key=key,
        model=footprint.model,
        backend=footprint.backend,
        peak_bytes=peak,
        samples=(known.samples if known else 0) + 1,
        load_seconds=footprint.load_seconds,
        seen_at=seen_at,
    ).execute()


def _prune() -> None:
    """Forget those not seen for longest, beyond the bound."""
    kept = FootprintRecord.select(FootprintRecord.key).order_by(FootprintRecord.seen_at.desc()).limit(KEPT_FOOTPRINTS)
    if FootprintRecord.select().count() > KEPT_FOOTPRINTS:
        FootprintRecord.delete().where(FootprintRecord.key.not_in(kept)).execute()


def _footprint(row: FootprintRecord) -> Footprint:
    return Footprint(
        model=ModelName(row.model),
        backend=BackendName(row.backend),
        peak=Bytes(row.peak_bytes),
        load_seconds=None if row.load_seconds is None else Seconds(row.load_seconds),
    )
