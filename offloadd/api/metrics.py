"""`GET /metrics`: the numbers of `/vram/status` and `/models` for Prometheus, read off one picture at each scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from offloadd import __version__
from offloadd.api import views
from offloadd.api.meters import Meters
from offloadd.api.picture import Picture
from offloadd.state.actions import ModelState
from offloadd.state.observed import InstanceState

_DEVICE = {
    "total_bytes": "Memory of the device",
    "used_bytes": "Memory that is not free",
    "free_bytes": "Memory that a new allocation could get",
    "limit_bytes": "Memory that may be promised to instances and loans",
    "reserved_bytes": "Memory that is promised",
    "lent_bytes": "Memory that people have borrowed",
    "foreign_bytes": "Memory that is used by others",
    "releasing_bytes": "Promised memory of instances on their way out",
    "room_bytes": "Memory that can be promised now",
    "utilization": "Share of time in which the device worked, 0 to 1",
    "temperature_c": "Temperature in degrees Celsius",
    "power_w": "Power drawn in watts",
}
_NAMES = {"utilization": "utilization_ratio", "temperature_c": "temperature_celsius", "power_w": "power_watts"}
_INSTANCE = {
    "reserved_bytes": "Memory promised to the instance",
    "measured_bytes": "Memory that its processes hold",
    "peak_bytes": "The most that they ever held",
}

OWN = {
    "client_connections": "Connections of clients that are open",
    "engine_connections": "Connections to engines that are open, those that wait for a next request included",
    "request_leases": "Places on instances that requests hold, those that only look included",
    "body_bytes": "Bytes of large bodies that are held for requests under way",
}


class PictureCollector(Collector):
    """Metrics of the present picture."""

    def __init__(self, look: Callable[[], Picture]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """One family after another, all of the same picture."""
        picture = self._look()
        yield InfoMetricFamily("offloadd", "The daemon", {"version": __version__})
        yield from _ledger(views.vram_status(picture)["devices"])
        yield from _models(picture)
        yield from _instances(picture)
        yield from _backends(picture)
        yield from _signals(picture)
        yield _loans(picture)
        yield _plain("offloadd_start_time_seconds", "When the daemon started, in Unix seconds", picture.started_wall)
        yield _plain("offloadd_config_generation", "Number of the applied config", picture.config.generation)
        yield _plain("offloadd_config_last_reload_success", "Whether the last reload was taken", picture.config.attempt_ok)
        text = "When a config was last read, in Unix seconds"
        yield _plain("offloadd_config_last_reload_timestamp_seconds", text, picture.config.attempt_wall)
        yield _plain("offloadd_scheduler_alive", "Whether the scheduler makes progress", picture.alive)
        yield _plain("offloadd_problems", "Problems that /health lists", len(list(picture.problems)))


class OwnCollector(Collector):
    """Metrics of what the daemon itself holds for others: the first place to look where it grows."""

    def __init__(self, held: Callable[[], Mapping[str, float]]) -> None:
        """`held` gives what there is of each of `OWN`."""
        self._held = held

    def collect(self) -> Iterator[Metric]:
        """As it is now. To be asked on the event loop."""
        for name, value in self._held().items():
            yield _plain(f"offloadd_{name}", OWN[name], value)
        yield _plain("offloadd_tasks", "Tasks of the event loop", len(asyncio.all_tasks()))


def exposition(meters: Meters, accept: str = "") -> tuple[bytes, str]:
    """What Prometheus scrapes, in the format that it accepts, and that format's name."""
    encode, content_type = choose_encoder(accept)
    return encode(meters.registry), content_type


def _ledger(devices: Iterable[views.Json]) -> Iterator[Metric]:
    listed = list(devices)
    for key, text in _DEVICE.items():
        family = GaugeMetricFamily(f"offloadd_device_{_NAMES.get(key, key)}", text, labels=("device", "kind"))
        for device in listed:
            if device[key] is not None:
                family.add_metric((device["id"], device["kind"]), device[key])
        yield family
    for key, text in _INSTANCE.items():
        family = GaugeMetricFamily(f"offloadd_instance_{key}", text, labels=("device", "model", "instance_id"))
        for device in listed:
            for held in device["instances"]:
                if held[key] is not None:
                    family.add_metric((device["id"], held["model"], held["instance"]), held[key])
        yield family


def _models(picture: Picture) -> Iterator[Metric]:
    states = GaugeMetricFamily("offloadd_model_state", "1 for the state that the model is in", labels=("model", "state"))
    waiting = GaugeMetricFamily("offloadd_model_waiting_requests", "Requests that wait for the model", labels=("model",))
    running = GaugeMetricFamily("offloadd_model_running_requests", "Requests that its instances work on", labels=("model",))
    text = "How long the request has waited that came first, in seconds"
    oldest = GaugeMetricFamily("offloadd_model_oldest_wait_seconds", text, labels=("model",))
    held: dict[str, int] = {}
    for instance, count in picture.demand.leases.items():
        held[instance.model] = held.get(instance.model, 0) + count
    for name in picture.desired.models:
        decision = picture.plan.decisions.get(name)
        for state in ModelState:
            states.add_metric((name, state), float(decision is not None and decision.state is state))
        queued = picture.demand.waiting.get(name)
        waiting.add_metric((name,), queued.count if queued else 0)
        oldest.add_metric((name,), max(0.0, picture.now - queued.oldest) if queued else 0)
        running.add_metric((name,), held.get(name, 0))
    yield from (states, waiting, running, oldest)


def _instances(picture: Picture) -> Iterator[Metric]:
    """How many there are of each engine in each state, and how many requests the ready ones can take at once."""
    counts = {(str(name), state): 0 for name in picture.desired.engines for state in InstanceState}
    slots = dict.fromkeys(picture.desired.models, 0)
    for view in picture.observed.instances.values():
        counts[view.backend, view.state] = counts.get((view.backend, view.state), 0) + 1
        if view.state is InstanceState.READY:
            slots[view.model] = slots.get(view.model, 0) + view.spec.parallel
    family = GaugeMetricFamily("offloadd_instances", "Instances by engine and state", labels=("backend", "state"))
    for (backend, state), count in counts.items():
        family.add_metric((backend, state), count)
    yield family
    text = "Requests that the model's ready instances take at once"
    family = GaugeMetricFamily("offloadd_model_slots", text, labels=("model",))
    for name, count in slots.items():
        family.add_metric((name,), count)
    yield family


def _backends(picture: Picture) -> Iterator[Metric]:
    family = GaugeMetricFamily("offloadd_backend_available", "Whether the engine can be started here", labels=("backend",))
    for name in picture.desired.engines:
        view = picture.observed.engines.get(name)
        family.add_metric((name,), float(view is not None and not view.problem))
    yield family


def _signals(picture: Picture) -> Iterator[Metric]:
    """What engines say of themselves, where they were asked a moment ago."""
    labels = ("backend", "model", "instance_id")
    text = "Requests that the engine says it works on, whoever asked for them"
    running = GaugeMetricFamily("offloadd_engine_running_requests", text, labels=labels)
    text = "Requests that the engine says it has taken and not begun"
    waiting = GaugeMetricFamily("offloadd_engine_waiting_requests", text, labels=labels)
    text = "Share of its KV cache that the engine says is in use, 0 to 1"
    cache = GaugeMetricFamily("offloadd_engine_kv_cache_usage_ratio", text, labels=labels)
    for view in picture.observed.instances.values():
        told = picture.signals.get(view.id)
        if told is not None:
            values = (view.backend, view.model, str(view.id))
            running.add_metric(values, told.running)
            waiting.add_metric(values, told.waiting)
            if told.cache is not None:
                cache.add_metric(values, told.cache)
    yield from (running, waiting, cache)


def _loans(picture: Picture) -> Metric:
    family = GaugeMetricFamily("offloadd_loans", "Loans of memory, by whether they were granted", labels=("granted",))
    granted = [loan.granted is not None for loan in picture.demand.loans.values()]
    family.add_metric(("yes",), sum(granted))
    family.add_metric(("no",), len(granted) - sum(granted))
    return family


def _plain(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))
