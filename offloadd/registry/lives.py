"""The daemon's own state, in `data_dir/state.db`: which instances it has begun, and how earlier ones ended. Everything blocks.

Memory holds the truth and the file follows it. What could not be written (a full disk, somebody who holds the file) is written
with the next change that can be; until then only a daemon that dies would miss it, and it would stop what it cannot vouch for.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from peewee import CharField, DatabaseError, Model, OperationalError, SqliteDatabase, TextField

from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, DeviceId, HostId, InstanceId, ModelName
from offloadd.state.launch import Endpoint, Placement
from offloadd.state.life import Life, ProcessId, SharedPiece
from offloadd.state.observed import ExitRecord
from offloadd.units import Bytes, Instant, Seconds

log = logging.getLogger(__name__)

_MEMORY = Path(":memory:")
_PRAGMAS = {"busy_timeout": 500, "journal_mode": "wal", "synchronous": "full"}


class LifeRecord(Model):
    """One instance that was begun and is not known to have ended."""

    mark = CharField(primary_key=True)
    body = TextField()
    """JSON, since nothing is ever looked for by anything but the mark."""

    class Meta:
        """The table's own name, so that renaming the class renames nothing on disk."""

        table_name = "life"


def _lives(database: SqliteDatabase) -> None:
    database.create_tables([LifeRecord])


class ExitsRecord(Model):
    """How the last instances of one model ended, so that whoever has been given up is not tried again for a daemon's death."""

    model = CharField(primary_key=True)
    body = TextField()

    class Meta:
        """As above."""

        table_name = "exits"


def _exits(database: SqliteDatabase) -> None:
    database.create_tables([ExitsRecord])


STEPS: tuple[Callable[[SqliteDatabase], None], ...] = (_lives, _exits)
_TABLES: tuple[type[Model], ...] = (LifeRecord, ExitsRecord)


class LifeBook:
    """One SQLite file. A damaged one is set aside, never deleted; for one that cannot be used now, memory stands in."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._lives: dict[str, Life] = {}
        self._unwritten: dict[tuple[type[Model], str], str | None] = {}
        """Rows that the file does not have yet; None is a row that is to go."""
        self._filed: set[tuple[type[Model], str]] = set()
        """Rows that the file has."""
        self.problem = ""
        """What is wrong with the file now; empty when nothing is."""
        self._lasting = ""
        """What of that stays until the next start."""
        self._database = self._open(path)
        self._filed = {(table, str(row.get_id())) for table in _TABLES for row in table.select()}
        self._lives = {life.mark: life for life in self._read()}

    def lives(self) -> list[Life]:
        """Every instance that was begun and is not known to have ended."""
        with self._lock:
            return list(self._lives.values())

    def keep(self, life: Life) -> None:
        """Write an instance down, in place of what was written of it before."""
        with self._lock:
            self._lives[life.mark] = life
            self._write(LifeRecord, life.mark, json.dumps(_body(life)))

    def drop(self, mark: str) -> None:
        """It has ended, and nothing of it is left."""
        with self._lock:
            if self._lives.pop(mark, None) is not None:
                self._write(LifeRecord, mark, None)

    def exits(self, boot: str) -> dict[ModelName, tuple[ExitRecord, ...]]:
        """How the last instances of each model ended in this boot of the machine, oldest first."""
        with self._lock:
            return dict(_records(boot))

    def keep_exits(self, boot: str, model: ModelName, records: Sequence[ExitRecord]) -> None:
        """Write down how a model's last instances ended; none takes away what was written."""
        with self._lock:
            self._write(ExitsRecord, model, _ENCODER.encode(_Exits(boot, list(records))).decode() if records else None)

    def forget_exits(self) -> None:
        """A daemon that ends in good order leaves no grudge: whoever starts it again wants everything tried again."""
        with self._lock:
            for row in list(ExitsRecord.select()):
                self._unwritten[ExitsRecord, row.model] = None
            self._flush()

    def retry(self) -> None:
        """Write what could not be written before, if there is any."""
        with self._lock:
            if self._unwritten:
                self._flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _write(self, table: type[Model], key: str, body: str | None) -> None:
        if body is None and (table, key) not in self._filed:
            self._unwritten.pop((table, key), None)  # it came and went while nothing could be written
        else:
            self._unwritten[table, key] = body
        self._flush()

    def _flush(self) -> None:
        """Write all that is behind: few rows, one for each living instance and each model."""
        try:
            with self._database.atomic("IMMEDIATE"):
                for (table, key), body in self._unwritten.items():
                    _put(table, key, body)
        except DatabaseError as error:
            why = _first_cause(error)
            if not self.problem:
                log.warning("the daemon's own state cannot be written: %s", why, extra=about(EventKind.REGISTRY_PROBLEM))
            self.problem = f"the daemon's own state cannot be written, so a crash now would end servers: {why}"
            return
        for row, body in self._unwritten.items():
            (self._filed.discard if body is None else self._filed.add)(row)
        self._unwritten.clear()
        self.problem = self._lasting

    def _read(self) -> Iterator[Life]:
        for row in LifeRecord.select():
            try:
                yield _life(row.mark, json.loads(row.body))
            except (ValueError, KeyError, TypeError) as error:
                # Its process is then one that nobody can vouch for, which is stopped.
                said = about(EventKind.REGISTRY_PROBLEM)
                log.warning("what is written of %s cannot be read: %r", row.mark, error, extra=said)

    def _open(self, path: Path) -> SqliteDatabase:
        said = about(EventKind.REGISTRY_PROBLEM)
        try:
            return _opened(path)
        except OperationalError as error:
            self.problem = self._lasting = f"{path} cannot be used, so a crash of the daemon would end its servers: {error}"
            log.warning("%s", self._lasting, extra=said)
            return _opened(_MEMORY)
        except DatabaseError as error:
            aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
            log.error("%s is damaged (%s); set aside as %s, and begun anew", path, error, aside, extra=said)  # noqa: TRY400
            self.problem = self._lasting = f"{path.name} was damaged; the old file is {aside}"
            for suffix in ("", "-wal", "-shm"):
                part = path.with_name(path.name + suffix)
                if part.exists():
                    part.rename(aside.with_name(aside.name + suffix))
            return _opened(path)


def _migrate(database: SqliteDatabase) -> None:
    """Bring the schema up to date; PermanentError when it is newer than this program."""
    have = int(database.execute_sql("PRAGMA user_version").fetchone()[0])
    if have > len(STEPS):
        message = f"state.db has schema {have}, and this offloadd knows {len(STEPS)}"
        raise PermanentError(message, hint="start the newer offloadd that wrote it, or move the file away")
    for number, step in enumerate(STEPS[have:], have + 1):
        with database.atomic("IMMEDIATE"):
            step(database)
            database.execute_sql(f"PRAGMA user_version = {number}")


def _keep_private(path: Path) -> None:
    """The keys of running servers are in it. What SQLite makes beside it has the same mode."""
    if path != _MEMORY:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _opened(path: Path) -> SqliteDatabase:
    _keep_private(path)
    database = SqliteDatabase(str(path), pragmas=_PRAGMAS, check_same_thread=False, thread_safe=False)
    try:
        database.connect()
        verdict = database.execute_sql("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise DatabaseError(verdict)
        database.bind(list(_TABLES))
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _first_cause(error: BaseException) -> BaseException:
    """A full disk ends the transaction by itself, and the attempt to end it then fails too: what came first tells."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _put(table: type[Model], key: str, body: str | None) -> None:
    name = table._meta.primary_key
    if body is None:
        table.delete().where(name == key).execute()
    else:
        table.replace({name: key, table.body: body}).execute()  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Exits:
    """What is written of one model's ends. Their instants mean nothing in another boot."""

    boot: str
    records: list[ExitRecord]


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_Exits)


def _records(boot: str) -> Iterator[tuple[ModelName, tuple[ExitRecord, ...]]]:
    for row in ExitsRecord.select():
        try:
            found = _DECODER.decode(row.body)
        except msgspec.MsgspecError:
            continue  # of another version: it is then tried again
        if found.boot == boot:
            yield ModelName(row.model), tuple(found.records)


def _body(life: Life) -> dict[str, Any]:
    spec, placement = life.spec, life.placement
    return {
        "host": life.instance.host,
        "model": life.instance.model,
        "number": life.instance.number,
        "spec": {
            "source": spec.source,
            "context": spec.context,
            "parallel": spec.parallel,
            "start_timeout": spec.start_timeout,
            "stop_timeout": spec.stop_timeout,
            "drain_timeout": spec.drain_timeout,
        },
        "backend": life.backend,
        "fingerprint": life.fingerprint,
        "footprint_key": life.footprint_key,
        "identity": life.identity,
        "reserved": _sizes_body(placement.reserved),
        "gpus": [_device_body(gpu) for gpu in placement.gpus],
        "split": list(placement.split),
        "elastic": placement.elastic,
        "sleeps": _sizes_body(placement.asleep),
        "asleep": None if life.asleep is None else _sizes_body(life.asleep),
        "endpoint": asdict(life.endpoint),
        "boot": life.boot,
        "started_at": life.started_at,
        "process": [life.process.pid, life.process.started] if life.process else None,
        "ready_at": life.ready_at,
        "stop_command": list(life.stop_command),
        "user": life.user,
        "group": life.group,
        "shared": [[piece.name, piece.device, piece.inode] for piece in life.shared],
        "stopping": life.stopping,
    }


def _life(mark: str, body: Any) -> Life:
    model, backend, spec = ModelName(body["model"]), BackendName(body["backend"]), body["spec"]
    process, ready_at = body["process"], body["ready_at"]
    return Life(
        mark=mark,
        instance=InstanceId(HostId(body["host"]), model, int(body["number"])),
        spec=ModelSpec(
            name=model,
            source=str(spec["source"]),
            backends=(backend,),
            context=int(spec["context"]),
            parallel=int(spec["parallel"]),
            start_timeout=Seconds(float(spec["start_timeout"])),
            stop_timeout=Seconds(float(spec["stop_timeout"])),
            drain_timeout=Seconds(float(spec["drain_timeout"])),
        ),
        backend=backend,
        fingerprint=str(body["fingerprint"]),
        footprint_key=str(body["footprint_key"]),
        identity=str(body["identity"]),
        placement=Placement(
            reserved=_sizes(body["reserved"]),
            gpus=tuple(_device(entry) for entry in body["gpus"]),
            split=tuple(int(count) for count in body["split"]),
            elastic=bool(body["elastic"]),
            asleep=_sizes(body.get("sleeps", ())),
        ),
        endpoint=Endpoint(**{**body["endpoint"], "more": tuple(body["endpoint"]["more"])}),
        boot=str(body["boot"]),
        started_at=Instant(float(body["started_at"])),
        process=ProcessId(pid=int(process[0]), started=int(process[1])) if process else None,
        ready_at=None if ready_at is None else Instant(float(ready_at)),
        asleep=None if body.get("asleep") is None else _sizes(body["asleep"]),
        stop_command=tuple(str(word) for word in body.get("stop_command", ())),  # older daemons wrote none
        user=str(body.get("user", "")),
        group=str(body.get("group", "")),
        shared=tuple(SharedPiece(name=str(name), device=int(dev), inode=int(ino)) for name, dev, ino in body.get("shared", ())),
        stopping=str(body["stopping"]),
    )


def _sizes_body(sizes: Mapping[DeviceId, Bytes]) -> list[Any]:
    return [[*_device_body(device), size] for device, size in sizes.items()]


def _sizes(entries: Iterable[Any]) -> dict[DeviceId, Bytes]:
    return {_device(entry): Bytes(int(entry[2])) for entry in entries}


def _device_body(device: DeviceId) -> list[Any]:
    return [device.host, device.name]


def _device(entry: Iterable[Any]) -> DeviceId:
    host, name, *_ = entry
    return DeviceId(HostId(str(host)), str(name))
