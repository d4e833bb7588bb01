"""What is counted of requests at their end: a few additions for each, which are made into metrics when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from offloadd.state.served import Fate, Served

_HOPS = {Fate.CANCELLED.value: "client", Fate.REFUSED.value: "offloadd", Fate.FAILED.value: "backend"}
"""Where a request that was not answered ended."""
_WAITS = (0.005, 0.05, 0.25, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_LASTS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_KINDS = ("prompt", "cached", "completion")
MAX_PLACES = 4096
"""Kinds of requests that are found with one look."""


class _Spread:
    """One histogram: how many values lie up to each bound, the last beyond all of them."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def put_into(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        if any(self._counts):
            names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
            family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class _Model:
    """What is counted by model alone."""

    __slots__ = ("lasts", "waits")

    def __init__(self) -> None:
        self.waits, self.lasts = _Spread(_WAITS), _Spread(_LASTS)


class _Engine:
    """What is counted by model and engine."""

    __slots__ = ("between", "first", "tokens")

    def __init__(self) -> None:
        self.first, self.between = _Spread(_FIRST), _Spread(_BETWEEN)
        self.tokens = [0, 0, 0]


class _Place(NamedTuple):
    """Where requests of one kind are counted."""

    ended: list[int]
    """One number: how many ended so."""
    model: _Model
    engine: _Engine


class RequestMeters(Collector):
    """Counters and histograms of requests. `known` gives the label for a name, of which there are not too many."""

    def __init__(self, known: Callable[[str], str]) -> None:
        self._known = known
        self._ends: dict[tuple[str, str, str, int], list[int]] = {}
        self._hedges: dict[tuple[str, str], int] = {}
        self._models: dict[str, _Model] = {}
        self._engines: dict[tuple[str, str], _Engine] = {}
        self._places: dict[tuple[str | None, str | None, str, str, int], _Place] = {}
        """By what requests say: found again with one look."""

    def served(self, served: Served) -> None:
        """One inference request is over."""
        fate = served.fate._value_  # as `value` says, without a call
        kind = (served.model, served.backend, served.path, fate, served.status)
        place = self._places.get(kind) or self._place(*kind)
        place.ended[0] += 1
        if served.hedged:
            name = self._known(served.model or "")
            self._hedges[name, served.hedged] = self._hedges.get((name, served.hedged), 0) + 1
        model, engine = place.model, place.engine
        model.lasts.add(served.duration)
        if served.waited is not None:
            model.waits.add(served.waited)
        if served.streamed and served.first_byte is not None:  # any other answer comes whole, at its end
            engine.first.add(served.first_byte)
        if served.tokens_per_second:
            engine.between.add(1 / served.tokens_per_second)
        tokens = engine.tokens
        tokens[0] += served.prompt_tokens or 0
        tokens[1] += served.cached_tokens or 0
        tokens[2] += served.completion_tokens or 0

    def _place(self, model: str | None, backend: str | None, path: str, fate: str, status: int) -> _Place:
        if len(self._places) >= MAX_PLACES:
            self._places.clear()
        name, engine = self._known(model or ""), self._known(backend or "")
        place = self._places[model, backend, path, fate, status] = _Place(
            self._ends.setdefault((name, path, fate, status), [0]),
            self._models.setdefault(name, _Model()),
            self._engines.setdefault((name, engine), _Engine()),
        )
        return place

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        yield from self._counters()
        text = "Time in the queue until an instance was granted"
        by_model = [((name,), model) for name, model in self._models.items()]
        by_engine = list(self._engines.items())
        yield _spreads("request_wait", text, ("model",), ((names, model.waits) for names, model in by_model))
        text = "Time from a request's arrival to its last byte"
        yield _spreads("request_duration", text, ("model",), ((names, model.lasts) for names, model in by_model))
        text = "Time from the grant to the first byte of an answer that is a stream"
        labels = ("model", "backend")
        yield _spreads("request_first_token", text, labels, ((names, engine.first) for names, engine in by_engine))
        text = "Mean time between two tokens of one answer"
        yield _spreads("request_inter_token", text, labels, ((names, engine.between) for names, engine in by_engine))

    def _counters(self) -> Iterator[Metric]:
        text = "Inference requests, by how they ended"
        requests = CounterMetricFamily("offloadd_requests", text, labels=("model", "path", "fate", "code"))
        missed: dict[tuple[str, str], int] = {}
        for (name, path, fate, status), (count,) in self._ends.items():
            requests.add_metric((name, path, fate, str(status)), count)
            if hop := _HOPS.get(fate):
                missed[hop, str(status)] = missed.get((hop, str(status)), 0) + count
        yield requests
        text = "Inference requests not answered, by where they ended"
        errors = CounterMetricFamily("offloadd_proxy_errors", text, labels=("hop", "code"))
        for labels, count in missed.items():
            errors.add_metric(labels, count)
        yield errors
        text = "Requests that a second instance was asked too (queue.hedge_after), by whether it won"
        hedges = CounterMetricFamily("offloadd_hedges", text, labels=("model", "outcome"))
        for labels, count in self._hedges.items():
            hedges.add_metric(labels, count)
        yield hedges
        tokens = CounterMetricFamily("offloadd_tokens", "Tokens of answered requests", labels=("model", "backend", "kind"))
        for (name, backend), engine in self._engines.items():
            for kind, count in zip(_KINDS, engine.tokens, strict=True):
                if count:
                    tokens.add_metric((name, backend, kind), count)
        yield tokens


def _spreads(name: str, text: str, labels: Sequence[str], spreads: Iterable[tuple[Sequence[str], _Spread]]) -> Metric:
    family = HistogramMetricFamily(f"offloadd_{name}_seconds", f"{text}, in seconds", labels=labels)
    for names, spread in spreads:
        spread.put_into(family, names)
    return family
