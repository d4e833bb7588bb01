"""`GET /models`: what is configured, what was found on disk, and what still runs although it is neither any more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from offloadd.api import views
from offloadd.api.picture import Picture
from offloadd.api.views import Json
from offloadd.config.discovered import Shelved
from offloadd.state.actions import ModelState
from offloadd.state.desired import ModelSpec, Origin
from offloadd.state.history import End, History, Load, Usage
from offloadd.state.observed import InstanceState

_LONG = 50
"""Models; working out where each would fit takes its time."""


def models(picture: Picture) -> Json:
    """OpenAI's list shape with an `offloadd` object in each entry."""
    return {"object": "list", "data": list(_entries(picture))}


def one(picture: Picture, name: str) -> Json | None:
    """The entry of a model by its name or an alias, whatever its origin; None when there is none."""
    for spec in _specs(picture):
        if name == spec.name or name in spec.aliases:
            return _entry(picture, spec)
    return None


def with_history(entry: Json, history: History) -> Json:
    """The entry of `GET /models/{name}`: with what the model did, newest first."""
    told = {
        "loads": [_load(load) for load in history.loads],
        "exits": [_end(end) for end in history.ends],
        "days": [{"day": day, **_usage(usage)} for day, usage in history.days.items()],
    }
    return {**entry, "offloadd": {**entry["offloadd"], "history": told}}


def _entries(picture: Picture) -> Iterator[Json]:
    return (_entry(picture, spec) for spec in _specs(picture))


def _specs(picture: Picture) -> Iterator[ModelSpec]:
    yield from picture.desired.models.values()
    yield from (each.spec for name, each in picture.shelf.items() if name not in picture.desired.models)
    yield from _leaving(picture)


def _leaving(picture: Picture) -> Iterable[ModelSpec]:
    """Models that are neither configured nor on disk any more, and have an instance that still runs."""
    known = picture.desired.models.keys() | picture.shelf.keys()
    running = (view for view in picture.observed.instances.values() if view.state is not InstanceState.EXITED)
    return {view.model: view.spec for view in running if view.model not in known}.values()


def _entry(picture: Picture, spec: ModelSpec) -> Json:
    entry = views.model(picture, spec)
    shelved = picture.shelf.get(spec.name) if spec.origin is Origin.DISCOVERED else None
    own = {**entry["offloadd"], "usage": _usage(picture.totals.get(spec.name, Usage()))}
    if shelved is not None:
        own.update(_found(shelved))
    if spec.name not in picture.desired.models:
        own.update(_not_served(picture, spec, shelved))
    return {**entry, "offloadd": own}


def _found(shelved: Shelved) -> Json:
    found, shape = shelved.found, shelved.found.loaded.shape
    told: Json = {
        "store": found.store,
        "format": found.format,
        "source": found.path,
        "size_bytes": found.facts.size,
        "adapters": list(found.adapters),
        "base": found.base.path if found.base else None,
        "projector": found.projector.path if found.projector else None,
    }
    return {**told, **views.shape(shape)} if shape else told


def _not_served(picture: Picture, spec: ModelSpec, shelved: Shelved | None) -> Json:
    """Why nobody can ask for it; what runs of it is told apart."""
    running = [view for view in picture.observed.instances.values() if view.model == spec.name]
    state = running[-1].state if running and running[-1].state is not InstanceState.EXITED else ModelState.OFF
    if shelved is not None:
        return {"state": state, "reason": shelved.problem, "hint": shelved.hint, "served": False}
    names = ", ".join(str(view.id) for view in running)
    reason = f"{_why_gone(picture, spec)}; {names} ends once its requests have"
    return {"state": state, "reason": reason, "hint": "", "served": False, "gone": True}


def _why_gone(picture: Picture, spec: ModelSpec) -> str:
    if spec.origin is Origin.CONFIGURED:
        return "the config does not name it any more"
    discovery = picture.desired.discovery
    return "its file is gone" if discovery.enabled and discovery.serve else "what is found on disk is not served any more"


def _usage(usage: Usage) -> Json:
    return {
        "requests": usage.answered + usage.refused + usage.cancelled + usage.failed,
        **{name: getattr(usage, name) for name in usage.__slots__ if name != "seconds"},
        "seconds": round(usage.seconds, 3),
    }


def _load(load: Load) -> Json:
    return {"at": load.at, "backend": load.backend, "seconds": round(load.seconds, 3), "size_bytes": load.size}


def _end(end: End) -> Json:
    return {
        "at": end.at,
        "instance": end.instance,
        "backend": end.backend,
        "kind": end.kind,
        "message": end.message,
        "expected": end.expected,
        "ready_for_s": None if end.ready_for is None else round(end.ready_for, 3),
        "peak_bytes": end.peak,
    }


def is_long(picture: Picture) -> bool:
    """Whether the list takes so long to make that the loop must not wait for it."""
    return len(picture.desired.models) + len(picture.shelf) > _LONG
