"""What happened lately: every event and every request's way, bounded, by model, by instance and by request; and who follows it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

import msgspec
from msgspec.structs import replace

from offloadd.errors import RequestError
from offloadd.events import About, EventKind, event_of
from offloadd.state.served import Served
from offloadd.units import Seconds, format_seconds

KEPT = 2000
"""Events remembered in all."""
KEPT_EACH = 100
"""Events remembered of one model, and of one instance, and of one request."""
NAMES = 2000
"""Models, instances and requests of which something is remembered, of each at most so many; and"""
KEPT_BYTES = 3 * 2**20
"""what that may take of memory, for each of the four: a few hundred instances, or two thousand requests. The one that was heard of
longest ago is forgotten first."""
KEPT_ENDS = 2000
"""Requests of which it is remembered how they ended, beside the latest of each model: so many over all models again."""
LONGEST_REASON = 300
"""Characters kept of why one ended so."""
BACKLOG = 500
"""Events that a follower may be behind; one that is slower is told so and let go."""
MAX_FOLLOWERS = 64
LONGEST = 2000
"""Characters kept of a message."""
_NAME_BYTES = 300
_ENTRY_BYTES = 700
_VALUE_BYTES = 120
"""What a name, an event and each of its values were measured to take, their texts aside. A request's end takes 900."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened. `number` grows by one with each."""

    number: int
    at: float
    """Unix seconds."""
    level: str
    message: str
    about: About

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        values = self.about.data.values()
        return _ENTRY_BYTES + len(self.message) + sum(_VALUE_BYTES + (len(each) if isinstance(each, str) else 0) for each in values)


class _Ended(msgspec.Struct, gc=False):
    """A request that is over. What there is to say of it is put into words when somebody asks, which nobody does for most."""

    number: int
    at: float
    served: Served

    def told(self) -> Entry:
        served = self.served
        data = {"path": served.path, "fate": served.fate.value, "status": served.status, "duration_s": round(served.duration, 4)}
        about = About(
            kind=EventKind.REQUEST_ENDED,
            model=served.model or "",
            instance=str(served.instance or ""),
            backend=served.backend or "",
            request=served.request,
            data=data,
        )
        return Entry(number=self.number, at=self.at, level="debug", message=_end_of(served)[:LONGEST], about=about)


@dataclass(slots=True)
class Follower:
    """One who is told everything from now on. Once `lost`, nothing more comes."""

    queue: asyncio.Queue[Entry | None] = field(default_factory=lambda: asyncio.Queue(BACKLOG))
    lost: bool = False

    def put(self, entry: Entry) -> bool:
        """Whether it could take the entry. One that could not is woken to hear that it was let go."""
        if self.queue.qsize() >= BACKLOG - 1:
            self.lost = True
            self.queue.put_nowait(None)
            return False
        self.queue.put_nowait(entry)
        return True


class _Ring:
    """The latest entries of each of the latest names."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, list[Entry]] = OrderedDict()  # most have few: a deque begins with room for 64
        self._size = 0

    def add(self, name: str, entry: Entry) -> None:
        if not name:
            return
        known = self._by_name.get(name)
        if known is None:
            known = self._by_name[name] = []
            self._size += _NAME_BYTES
        else:
            self._by_name.move_to_end(name)
        known.append(entry)
        self._size += entry.size
        if len(known) >= 2 * KEPT_EACH:
            self._size -= sum(each.size for each in known[:-KEPT_EACH])
            del known[:-KEPT_EACH]
        while self._by_name and (self._size > KEPT_BYTES or len(self._by_name) > NAMES):
            _, gone = self._by_name.popitem(last=False)
            self._size -= _NAME_BYTES + sum(each.size for each in gone)

    def of(self, name: str) -> list[Entry]:
        return self._by_name.get(name, [])[-KEPT_EACH:]


class _Ends:
    """How the latest requests ended: over all, and of each model apart, so that a busy one does not push those of others out.

    Most of what is written here nobody reads: so writing is all that has to be quick.
    """

    def __init__(self) -> None:
        self._latest: deque[_Ended] = deque(maxlen=KEPT_ENDS)
        self._by_model: OrderedDict[str, deque[_Ended]] = OrderedDict()
        self._count = 0

    def add(self, ended: _Ended) -> None:
        model = ended.served.model or ""
        known = self._by_model.get(model)
        if known is None:
            known = self._by_model[model] = deque(maxlen=KEPT_EACH)
        else:
            self._by_model.move_to_end(model)
        if len(known) < KEPT_EACH:
            self._count += 1
        known.append(ended)
        self._latest.append(ended)
        while self._count > KEPT_ENDS:
            _, gone = self._by_model.popitem(last=False)
            self._count -= len(gone)

    def of_model(self, name: str) -> list[Entry]:
        return [each.told() for each in self._by_model.get(name, ())]

    def of_request(self, name: str) -> list[Entry]:
        return [each.told() for each in self._latest if each.served.request == name]


class Recent(logging.Handler):
    """A log handler that remembers events. Requests that went well are told to it as well, which no log shows."""

    def __init__(self, wall: Callable[[], float]) -> None:
        super().__init__()
        self._wall = wall
        self._loop_thread = threading.get_ident()
        self._numbers = count(1)
        self._all: deque[Entry] = deque(maxlen=KEPT)
        self._models, self._instances, self._requests = _Ring(), _Ring(), _Ring()
        self._waits = _Ring()
        """Of each model, which requests had to wait: apart, so that many requests don't push decisions out."""
        self._ends = _Ends()
        """Written and read on the loop's thread only, and so without a lock."""
        self._followers: list[Follower] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Remember the record if it is an event."""
        about = event_of(record)
        if about is not None and about.kind is not EventKind.REQUEST_ENDED:  # `served` tells of those
            self._add(about, record.getMessage(), record.levelname.lower(), record.created)

    def waits(self, model: str, request: str, why: str) -> None:
        """A request was put into its model's queue."""
        about = About(kind=EventKind.REQUEST_WAITS, model=model, request=request)
        entry = self._entry(about, f"waits for {model}: {why}", "debug", self._wall())
        with self._guard():
            self._requests.add(request, entry)
            self._waits.add(model, entry)

    def served(self, served: Served) -> None:
        """A request is over."""
        if len(served.reason) > LONGEST_REASON:
            served = replace(served, reason=served.reason[:LONGEST_REASON])
        self._ends.add(_Ended(next(self._numbers), self._wall(), served))

    def latest(self) -> list[Entry]:
        """The latest events, oldest first."""
        with self._guard():
            return list(self._all)

    def of_model(self, name: str) -> list[Entry]:
        """Of one model."""
        with self._guard():
            return self._models.of(name)

    def of_instance(self, name: str) -> list[Entry]:
        """Of one instance."""
        with self._guard():
            return self._instances.of(name)

    def requests_of(self, model: str) -> list[Entry]:
        """How its latest requests fared."""
        with self._guard():
            return _in_order([*self._waits.of(model), *self._ends.of_model(model)])[-KEPT_EACH:]

    def of_request(self, name: str) -> list[Entry]:
        """What one request met."""
        with self._guard():
            return _in_order([*self._requests.of(name), *self._ends.of_request(name)])[-KEPT_EACH:]

    def follow(self) -> Follower:
        """Be told everything from now on; RequestError when too many are told already."""
        if len(self._followers) >= MAX_FOLLOWERS:
            raise RequestError(429, "too_many_followers", f"{MAX_FOLLOWERS} follow the events already", retry_after=Seconds(10))
        self._loop = asyncio.get_running_loop()
        follower = Follower()
        self._followers.append(follower)
        return follower

    def leave(self, follower: Follower) -> None:
        """Be told nothing more."""
        if follower in self._followers:
            self._followers.remove(follower)

    def _guard(self) -> threading.RLock:
        if self.lock is None:  # as logging has it before a handler is made
            self.createLock()
        assert self.lock is not None  # noqa: S101
        return self.lock

    def _entry(self, about: About, message: str, level: str, at: float) -> Entry:
        return Entry(number=next(self._numbers), at=at, level=level, message=message[:LONGEST], about=about)

    def _add(self, about: About, message: str, level: str, at: float) -> None:
        entry = self._entry(about, message, level, at)
        self._all.append(entry)
        self._models.add(about.model, entry)
        self._instances.add(about.instance, entry)
        self._requests.add(about.request, entry)
        if self._followers and self._loop is not None:
            if threading.get_ident() == self._loop_thread:
                self._spread(entry)
            else:
                self._loop.call_soon_threadsafe(self._spread, entry)

    def _spread(self, entry: Entry) -> None:
        self._followers = [follower for follower in self._followers if follower.put(entry)]


def _in_order(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.number)


def shown(entry: Entry) -> Mapping[str, object]:
    """An entry as JSON: empty names are left out."""
    about = entry.about
    names = {"model": about.model, "instance": about.instance, "backend": about.backend, "request": about.request}
    known = {key: name for key, name in names.items() if name}
    head = {"id": entry.number, "at": round(entry.at, 3), "level": entry.level, "kind": about.kind.value}
    return {**head, **known, "message": entry.message, **({"data": dict(about.data)} if about.data else {})}


def _end_of(served: Served) -> str:
    where = f" by {served.instance}" if served.instance else ""
    waited = f", after {format_seconds(served.waited)} in the queue" if served.waited else ""
    why = f": {served.reason}" if served.reason else ""
    return f"{served.path} {served.fate.value} with {served.status}{where} in {format_seconds(served.duration)}{waited}{why}"
