"""Typed reads and writes of the registry. Everything blocks: call it in a thread.

It never takes the daemon down. What cannot be used now (a full disk, a read-only folder, a lock, a server that is away) is tried
again, and what is to be written waits; a damaged file is set aside, never deleted, and begun anew: what it held is learned again.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from peewee import EXCLUDED, Case, Database, DatabaseError, Model, PeeweeException, SqliteDatabase

from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.registry import records
from offloadd.registry.batch import Batch
from offloadd.registry.database import DamagedError, Place, is_damage, open_database, set_aside
from offloadd.registry.records import EndRecord, FootprintRecord, FoundRecord, LoadRecord, UsageRecord
from offloadd.state.found import Found, Shelf
from offloadd.state.history import End, History, Load, Usage
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Footprint
from offloadd.units import Bytes, Seconds

log = logging.getLogger(__name__)

T = TypeVar("T")

KEPT_FOOTPRINTS = 10_000
KEPT_FOUND = 100_000
KEPT_EVENTS = 20_000
"""Loads, and as many ends."""
KEPT_DAYS = 100_000
"""Days of models."""
DAY_S = 86400.0
FOUND_AGE_S = 30 * DAY_S
EVENT_AGE_S = 90 * DAY_S
USAGE_AGE_S = 400 * DAY_S
SHOWN_EVENTS = 20
SHOWN_DAYS = 31
REOPEN_S = 5.0
"""How often a registry that could not be opened is tried again."""
PRUNE_EVERY = 50
"""Writes between two prunings."""
_ROWS = 500
_turn = threading.RLock()
"""peewee's records are bound to one database at a time: whoever uses them has the turn."""


class Registry:
    """One SQLite file of one daemon, or a PostgreSQL server for several."""

    def __init__(self, place: Path | Place, *, host: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._place = place if isinstance(place, Place) else Place(file=place)
        self._host = host or socket.gethostname()
        self._clock = clock
        self._database: Database | None = None
        self._tried = float("-inf")
        self._writes = 0
        self.problem = ""
        """What is wrong with the registry now; empty when nothing is."""
        self.opened = 0
        """How often it was opened: after another time, what was read before may be incomplete."""
        self._setback = ""
        """What went wrong and is told until the next write succeeds."""
        with _turn:
            self._open()

    def footprints(self) -> dict[str, Footprint]:
        """Everything learned, by key; empty while it cannot be read."""
        return self._read(lambda: {row.key: _footprint(row) for row in FootprintRecord.select()}, {})

    def found(self) -> Shelf:
        """The models on this machine's disk as they were last seen."""
        rows: list[FoundRecord] = []
        rows = self._read(lambda: list(FoundRecord.select().where(FoundRecord.host == self._host)), rows)
        present = ((row.path, _read_found(row.body)) for row in rows if not row.gone)
        return Shelf(
            present={path: found for path, found in present if found is not None},
            names={row.path: ModelName(row.name) for row in rows},
        )

    def totals(self) -> dict[ModelName, Usage]:
        """Everything that each model ever did, as far as it is remembered."""
        totals: dict[ModelName, Usage] = {}
        rows: list[UsageRecord] = []
        for row in self._read(lambda: list(UsageRecord.select()), rows):
            name = ModelName(row.model)
            totals[name] = totals.get(name, Usage()).plus(_usage(row))
        return totals

    def history(self, model: ModelName) -> History:
        """What one model did, the latest of it."""
        return self._read(lambda: _history(model), History())

    def learn(self, found: Mapping[str, Footprint], seen_at: float) -> bool:
        """Remember peaks; a higher one than known replaces it. `seen_at` is Unix seconds. False as from `write`."""
        return self.write(Batch(footprints=dict(found)), seen_at)

    def write(self, batch: Batch, now: float) -> bool:
        """Write it all in one transaction; `now` is Unix seconds. What is True is on disk.

        False when it could not be done (a full disk, a locked file), which `problem` then explains: give it again later.
        """
        with _turn:
            if not self._usable():
                return False
            try:
                assert self._database is not None  # noqa: S101  (it is usable)
                with self._transaction(self._database):
                    self._write(batch, now)
                    if self._writes % PRUNE_EVERY == 0:
                        self._prune(now)
            except (PeeweeException, OSError) as error:
                self._failed(error, "written")
                return False
            self._writes += 1
            self.problem = self._setback = ""
            return True

    def close(self) -> None:
        """Close it."""
        with _turn:
            self._drop()

    def _read(self, read: Callable[[], T], otherwise: T) -> T:
        with _turn:
            if not self._usable():
                return otherwise
            try:
                return read()
            except (PeeweeException, OSError) as error:
                self._failed(error, "read")
                return otherwise

    def _transaction(self, database: Database) -> Any:
        # SQLite: a transaction that begins with a read and then writes fails at once when another has written in between.
        return database.atomic("IMMEDIATE") if isinstance(database, SqliteDatabase) else database.atomic()

    def _usable(self) -> bool:
        if self._database is None:
            self._open()
        if self._database is not None:
            records.bind(self._database)
        return self._database is not None

    def _open(self) -> None:
        """Open it, unless that was tried a moment ago. A newer schema is refused: PermanentError at the first time."""
        if self._clock() - self._tried < REOPEN_S:
            return
        self._tried = self._clock()
        try:
            self._database = self._opened()
        except PermanentError as error:
            if not self.opened:
                raise
            self._tell(f"the registry cannot be used: {error.message}")
            return
        except (PeeweeException, OSError) as error:
            self._tell(f"the registry {self._place} cannot be used, and what is learned waits to be written: {_said(error)}")
            return
        self.opened += 1
        self.problem = self._setback
        if self.opened > 1:
            log.info("the registry %s can be used", self._place)

    def _opened(self) -> Database:
        try:
            return open_database(self._place)
        except DamagedError as error:
            assert self._place.file is not None  # noqa: S101  (only files are damaged)
            aside = set_aside(self._place.file)
            said = about(EventKind.REGISTRY_PROBLEM)
            path = self._place.file
            log.error("the registry %s is damaged (%s); set aside as %s, and begun anew", path, error, aside, extra=said)  # noqa: TRY400
            self._setback = f"the registry was damaged; the old file is {aside}"
            return open_database(self._place)

    def _failed(self, error: Exception, what: str) -> None:
        """Tell, and open it anew where that can help: a server that was away, a file that is damaged."""
        self._tell(f"the registry cannot be {what}: {_said(error)}")
        damaged = isinstance(error, DatabaseError) and is_damage(error)
        if damaged or not isinstance(self._database, SqliteDatabase):
            self._drop()
        if damaged:
            self._tried = float("-inf")

    def _tell(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("%s", problem, extra=about(EventKind.REGISTRY_PROBLEM))
        self.problem = problem

    def _drop(self) -> None:
        if self._database is not None:
            try:
                self._database.close()
            except (PeeweeException, OSError) as error:
                log.debug("closing the registry: %s", error)
            self._database = None

    def _write(self, batch: Batch, now: float) -> None:
        for former, key in batch.moved.items():
            if FootprintRecord.get_or_none(FootprintRecord.key == key) is None:
                FootprintRecord.update(key=key).where(FootprintRecord.key == former).execute()
        for key, footprint in batch.footprints.items():
            _keep_higher(key, footprint, now)
        _insert(LoadRecord, [_load_row(load, self._host) for load in batch.loads])
        _insert(EndRecord, [_end_row(end, self._host) for end in batch.ends])
        for (model, day), usage in batch.usage.items():
            _add_usage(model, day, usage)
        rows = [_found_row(path, found, self._host, now) for path, found in batch.found.items() if found is not None]
        for start in range(0, len(rows), _ROWS):
            FoundRecord.insert_many(rows[start : start + _ROWS]).on_conflict(
                conflict_target=[FoundRecord.host, FoundRecord.path],
                preserve=[FoundRecord.name, FoundRecord.content, FoundRecord.body, FoundRecord.gone, FoundRecord.seen_at],
            ).execute()
        gone = [path for path, found in batch.found.items() if found is None]
        for start in range(0, len(gone), _ROWS):
            here = (FoundRecord.host == self._host) & FoundRecord.path.in_(gone[start : start + _ROWS])
            FoundRecord.update(gone=True, seen_at=now).where(here).execute()

    def _prune(self, now: float) -> None:
        """Forget, but not what lies here still: its row is written when it changes, and it is seen at every look."""
        is_here = (FoundRecord.host == self._host) & ~FoundRecord.gone & (FoundRecord.seen_at < now - DAY_S)
        FoundRecord.update(seen_at=now).where(is_here).execute()
        _prune_all(now)


def _said(error: BaseException) -> str:
    # A full disk ends SQLite's transaction by itself; that there is none left to roll back is then not what went wrong.
    while "no transaction is active" in str(error) and error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())[:300]


def _insert(record: type[Model], rows: list[dict[str, object]]) -> None:
    for start in range(0, len(rows), _ROWS):
        record.insert_many(rows[start : start + _ROWS]).execute()


def _keep_higher(key: str, footprint: Footprint, seen_at: float) -> None:
    row = {
        "key": key,
        "model": footprint.model,
        "backend": footprint.backend,
        "peak_bytes": footprint.peak,
        "samples": 1,
        "load_seconds": footprint.load_seconds,
        "seen_at": seen_at,
    }
    known = FootprintRecord.peak_bytes
    FootprintRecord.insert(row).on_conflict(
        conflict_target=[FootprintRecord.key],
        preserve=[FootprintRecord.model, FootprintRecord.backend, FootprintRecord.load_seconds, FootprintRecord.seen_at],
        update={
            known: _greater(known, EXCLUDED.peak_bytes),
            FootprintRecord.samples: FootprintRecord.samples + 1,
        },
    ).execute()


def _greater(one: Any, other: Any) -> Any:
    return Case(None, ((one >= other, one),), other)


def _add_usage(model: ModelName, day: str, usage: Usage) -> None:
    counts = {name: getattr(usage, name) for name in usage.__slots__}
    UsageRecord.insert({"model": model, "day": day, **counts}).on_conflict(
        conflict_target=[UsageRecord.model, UsageRecord.day],
        update={getattr(UsageRecord, name): getattr(UsageRecord, name) + getattr(EXCLUDED, name) for name in counts},
    ).execute()


def _prune_all(now: float) -> None:
    """Forget what is too old, and of what is too much those not seen for longest."""
    FoundRecord.delete().where(FoundRecord.seen_at < now - FOUND_AGE_S).execute()
    UsageRecord.delete().where(UsageRecord.day < day_of(now - USAGE_AGE_S)).execute()
    LoadRecord.delete().where(LoadRecord.at < now - EVENT_AGE_S).execute()
    EndRecord.delete().where(EndRecord.at < now - EVENT_AGE_S).execute()
    bounds: Iterable[tuple[type[Model], str, int]] = (
        (FootprintRecord, "seen_at", KEPT_FOOTPRINTS),
        (FoundRecord, "seen_at", KEPT_FOUND),
        (LoadRecord, "at", KEPT_EVENTS),
        (EndRecord, "at", KEPT_EVENTS),
        (UsageRecord, "day", KEPT_DAYS),
    )
    for record, column, kept in bounds:
        order = getattr(record, column)
        if record.select().count() > kept:
            oldest = record.select(order).order_by(order.desc()).offset(kept - 1).limit(1).scalar()
            record.delete().where(order < oldest).execute()


def day_of(wall: float) -> str:
    """The UTC day of a time in Unix seconds, as `2026-11-25`."""
    return time.strftime("%Y-%m-%d", time.gmtime(wall))


def _load_row(load: Load, host: str) -> dict[str, object]:
    return {
        "model": load.model,
        "backend": load.backend,
        "host": host,
        "at": load.at,
        "seconds": load.seconds,
        "size_bytes": load.size,
    }


def _end_row(end: End, host: str) -> dict[str, object]:
    return {
        "model": end.model,
        "backend": end.backend,
        "host": host,
        "instance": end.instance,
        "at": end.at,
        "kind": end.kind,
        "message": end.message[:1000].replace("\0", ""),
        "expected": end.expected,
        "ready_seconds": end.ready_for,
        "peak_bytes": end.peak,
    }


def _found_row(path: str, found: Found, host: str, now: float) -> dict[str, object]:
    body = msgspec.json.encode(found).decode()
    return {
        "host": host,
        "path": path,
        "name": found.name,
        "content": found.facts.content,
        "body": body,
        "gone": False,
        "seen_at": now,
    }


def _read_found(body: str) -> Found | None:
    """None for one that another version wrote and that is not understood: it is read from disk again."""
    try:
        return msgspec.json.decode(body, type=Found)
    except msgspec.MsgspecError:
        return None


def _history(model: ModelName) -> History:
    loads = LoadRecord.select().where(LoadRecord.model == model).order_by(LoadRecord.at.desc()).limit(SHOWN_EVENTS)
    ends = EndRecord.select().where(EndRecord.model == model).order_by(EndRecord.at.desc()).limit(SHOWN_EVENTS)
    days = UsageRecord.select().where(UsageRecord.model == model).order_by(UsageRecord.day.desc()).limit(SHOWN_DAYS)
    return History(
        loads=tuple(_load(row) for row in loads),
        ends=tuple(_end(row) for row in ends),
        days={row.day: _usage(row) for row in days},
    )


def _load(row: LoadRecord) -> Load:
    size = None if row.size_bytes is None else Bytes(row.size_bytes)
    return Load(model=ModelName(row.model), backend=BackendName(row.backend), at=row.at, seconds=Seconds(row.seconds), size=size)


def _end(row: EndRecord) -> End:
    return End(
        model=ModelName(row.model),
        backend=BackendName(row.backend),
        instance=row.instance,
        at=row.at,
        kind=row.kind,
        message=row.message,
        expected=row.expected,
        ready_for=None if row.ready_seconds is None else Seconds(row.ready_seconds),
        peak=None if row.peak_bytes is None else Bytes(row.peak_bytes),
    )


def _usage(row: UsageRecord) -> Usage:
    return Usage(**{name: getattr(row, name) for name in Usage.__slots__})


def _footprint(row: FootprintRecord) -> Footprint:
    return Footprint(
        model=ModelName(row.model),
        backend=BackendName(row.backend),
        peak=Bytes(row.peak_bytes),
        load_seconds=None if row.load_seconds is None else Seconds(row.load_seconds),
    )
