"""What is counted as it happens: requests at their end, instances' lives off the log's events, the scheduler's cycles.

Every label has few values: names of the config, kinds that the code lists, and never what a client wrote. Names beyond a bound,
which only many edits of a config can reach, are counted together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from offloadd.api.request_meters import RequestMeters
from offloadd.events import About, EventKind, event_of
from offloadd.units import Seconds

MAX_NAMES = 256
OTHERS = "(others)"
_LOADS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_CYCLES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Meters:
    """Counters and histograms since the daemon's start. `registry` holds them; `handler` is to be given the log's records."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=False)
        self.handler: logging.Handler = _EventHandler(self)
        self._names: set[str] = {""}
        self._failed: dict[str, str] = {}
        ProcessCollector(namespace="offloadd", registry=self.registry)
        requests = RequestMeters(self._known)
        self.registry.register(requests)
        self.served = requests.served
        """To be told of each inference request at its end."""

        count, spread = self._count, self._spread
        self._starts = count("instance_starts", "Instances launched", "model", "backend")
        self._loads = count("instance_loads", "Instances that became ready", "model", "backend")
        self._load_times = spread("instance_load", "Time from launch to ready", _LOADS, "model", "backend")
        self._sleeps = count("instance_sleeps", "Instances put to sleep, their memory seen to be free", "model", "backend")
        self._wakes = spread("instance_wake", "Time from the order to wake to the first token", _LOADS, "model", "backend")
        text = "Launches after a failed one, by how that one ended"
        self._restarts = count("instance_restarts", text, "model", "reason")
        text = "Instances told to stop, by why; evicted is for another model's sake"
        self._stops = count("instance_stops", text, "model", "reason")
        self._ends = count(
            "instance_ends", "Instances ended, by how, and whether they had been told to", "model", "cause", "expected"
        )
        self._kills = count("instance_kills", "Instances that had to be killed, or left processes that had to be", "model")
        self._adopted = count("instance_adoptions", "Instances taken over alive from an earlier daemon", "model")

        self._reloads = count("config_reloads", "Configs read again, by outcome", "outcome")
        self._cycles = spread("reconcile_duration", "Time that one look, plan and hand-over took", _CYCLES)
        self._lines = count("log_messages", "Lines of the daemon's log", "level")
        self._internal = count("internal_errors", "Errors that are bugs; the log tells of each")
        for outcome in ("applied", "refused"):
            self._reloads.labels(outcome)
        self._events: Mapping[EventKind, Callable[[About, str, str], None]] = {
            EventKind.INSTANCE_SPAWNED: self._spawned,
            EventKind.INSTANCE_READY: self._ready,
            EventKind.INSTANCE_ENDED: self._ended,
            EventKind.INSTANCE_ASLEEP: lambda _, model, backend: self._sleeps.labels(model, backend).inc(),
            EventKind.INSTANCE_AWAKE: self._awoke,
            EventKind.INSTANCE_STOPPING: lambda event, model, _: self._stops.labels(model, str(event.data.get("reason", ""))).inc(),
            EventKind.INSTANCE_KILLED: lambda _, model, __: self._kills.labels(model).inc(),
            EventKind.INSTANCE_ADOPTED: lambda _, model, __: self._adopted.labels(model).inc(),
            EventKind.CONFIG_APPLIED: lambda *_: self._reloads.labels("applied").inc(),
            EventKind.CONFIG_REFUSED: lambda *_: self._reloads.labels("refused").inc(),
            EventKind.INTERNAL_ERROR: lambda *_: self._internal.inc(),
        }

    def cycled(self, took: Seconds) -> None:
        """The scheduler went once around."""
        self._cycles.observe(took)

    def told(self, level: str, event: About | None) -> None:
        """A line of the log, and what it is about when it is an event."""
        self._lines.labels(level).inc()
        if event is not None and (count := self._events.get(event.kind)):
            count(event, self._known(event.model), self._known(event.backend))

    def _spawned(self, _: About, model: str, backend: str) -> None:
        self._starts.labels(model, backend).inc()
        if cause := self._failed.pop(model, ""):
            self._restarts.labels(model, cause).inc()

    def _ready(self, event: About, model: str, backend: str) -> None:
        took = event.data.get("load_s")
        self._loads.labels(model, backend).inc()
        if isinstance(took, int | float):
            self._load_times.labels(model, backend).observe(took)

    def _awoke(self, event: About, model: str, backend: str) -> None:
        took = event.data.get("wake_s")
        if isinstance(took, int | float):
            self._wakes.labels(model, backend).observe(took)

    def _ended(self, event: About, model: str, _: str) -> None:
        cause, expected = str(event.data.get("cause", "")), bool(event.data.get("expected"))
        self._ends.labels(model, cause, "yes" if expected else "no").inc()
        if not expected:
            self._failed[model] = cause

    def _known(self, name: str) -> str:
        """The name itself, while there are not too many."""
        if name not in self._names:
            if len(self._names) > MAX_NAMES:
                return OTHERS
            self._names.add(name)
        return name

    def _count(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"offloadd_{name}", text, labels, registry=self.registry)

    def _spread(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"offloadd_{name}_seconds", f"{text}, in seconds", labels, buckets=buckets, registry=self.registry)


class _EventHandler(logging.Handler):
    """Hands the log's records to the meters."""

    def __init__(self, meters: Meters) -> None:
        super().__init__(logging.INFO)
        self._meters = meters

    def emit(self, record: logging.LogRecord) -> None:
        """Count it."""
        self._meters.told(record.levelname.lower(), event_of(record))
