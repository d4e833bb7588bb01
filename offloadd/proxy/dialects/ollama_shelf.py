"""Ollama's lists: the models there are, those that are loaded, and one in full. State to JSON, as its clients read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec, RunMode
from offloadd.state.ids import HOST_RAM, BackendName
from offloadd.state.launch import EngineApi, ModelFacts
from offloadd.state.observed import InstanceState, InstanceView, ObservedState
from offloadd.state.shape import ModelShape
from offloadd.units import Instant

Object = dict[str, Any]

_FAR = 100 * 365 * 86400.0
"""Seconds; when a model that stays loaded is said to expire."""


class Sight(Protocol):
    """One reading of everything, as far as it matters here."""

    @property
    def desired(self) -> DesiredState:
        """The config in force."""
        ...

    @property
    def observed(self) -> ObservedState:
        """Instances and files."""
        ...

    @property
    def demand(self) -> Demand:
        """Who uses what."""
        ...

    @property
    def started_wall(self) -> float:
        """Unix seconds of the daemon's start."""
        ...

    def wall_of(self, instant: Instant) -> float:
        """Unix seconds of a monotonic instant."""
        ...


def tags(sight: Sight) -> Object:
    """`GET /api/tags`. What never runs is not offered."""
    offered = [spec for spec in sight.desired.models.values() if spec.run is not RunMode.NEVER]
    return {"models": [{**_head(sight, spec), "modified_at": _date(sight.started_wall)} for spec in offered]}


def running(sight: Sight) -> Object:
    """`GET /api/ps`: one entry for each loaded instance."""
    ready = [view for view in sight.observed.instances.values() if view.state is InstanceState.READY]
    views = [view for view in ready if view.model in sight.desired.models]
    return {"models": [_loaded(sight, view) for view in views]}


def show(sight: Sight, spec: ModelSpec, api_of: Callable[[ModelSpec, BackendName], EngineApi]) -> Object:
    """`POST /api/show`."""
    shape = _facts(sight, spec).shape
    return {
        "modelfile": f"# served by offloadd\nFROM {spec.source}\nPARAMETER num_ctx {spec.context}\n",
        "parameters": f"num_ctx {spec.context}",
        "template": "",
        "details": _details(shape),
        "model_info": _info(shape, spec),
        "capabilities": _capabilities(shape, [api_of(spec, name) for name in spec.backends]),
        "modified_at": _date(sight.started_wall),
    }


def _head(sight: Sight, spec: ModelSpec) -> Object:
    facts = _facts(sight, spec)
    digest = hashlib.sha256((facts.identity or spec.source).encode()).hexdigest()
    return {"name": spec.name, "model": spec.name, "size": facts.size or 0, "digest": digest, "details": _details(facts.shape)}


def _loaded(sight: Sight, view: InstanceView) -> Object:
    held = {device: max(size, view.measured.get(device, 0)) for device, size in view.placement.reserved.items()}
    on_gpus = sum(size for device, size in held.items() if device != HOST_RAM)
    return {
        **_head(sight, view.spec),
        "size": sum(held.values()),
        "size_vram": on_gpus,
        "context_length": view.spec.context,
        "expires_at": _date(_expiry(sight, view)),
    }


def _expiry(sight: Sight, view: InstanceView) -> float:
    """When it will be unloaded if nobody asks for it."""
    spec = sight.desired.models.get(view.model, view.spec)
    used = sight.demand.last_used.get(view.model, view.ready_at or view.since)
    stays = spec.run is RunMode.ALWAYS or spec.pinned or not spec.idle_timeout
    return sight.wall_of(Instant(used)) + (_FAR if stays else spec.idle_timeout)


def _facts(sight: Sight, spec: ModelSpec) -> ModelFacts:
    """What is known of the files that the first engine which can read them would load."""
    candidates = sight.observed.candidates.get(spec.name, ())
    return next((candidate.facts for candidate in candidates if candidate.facts.size is not None), ModelFacts())


def _details(shape: ModelShape | None) -> Object:
    family = shape.architecture if shape else ""
    return {
        "parent_model": "",
        "format": "gguf" if shape else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _count(shape.parameters) if shape else "",
        "quantization_level": shape.quantization if shape else "",
    }


def _info(shape: ModelShape | None, spec: ModelSpec) -> Object:
    """Keys as a GGUF file names them. The context is the one that is served, and the one that the model was trained for."""
    if shape is None:
        return {"general.architecture": "", "offloadd.context_length": spec.context}
    name = shape.architecture
    return {
        "general.architecture": name,
        "general.parameter_count": shape.parameters,
        f"{name}.context_length": shape.context_train,
        f"{name}.embedding_length": shape.embedding,
        f"{name}.block_count": len(shape.layers),
        "offloadd.context_length": spec.context,
    }


def _capabilities(shape: ModelShape | None, apis: list[EngineApi]) -> list[str]:
    paths = frozenset(path for api in apis for path in api.paths)
    can_chat = shape is None or (shape.causal and shape.chat_template)
    found = {
        "completion": shape is None or shape.causal,
        "tools": can_chat and "/v1/chat/completions" in paths,
        "insert": "/infill" in paths and shape is not None and shape.causal and not shape.chat_template,
        "vision": any(api.images for api in apis),
        "embedding": "/v1/embeddings" in paths,
    }
    return [name for name, has in found.items() if has]


def _count(parameters: int) -> str:
    """`8.0B`, `134.5M`: as Ollama says it."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)


def _date(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).isoformat().replace("+00:00", "Z")
