"""One engine's offer to serve one model, from the config, the file's facts and what earlier launches took."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from offloadd.backends.base import Backend, fingerprint
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import ModelName
from offloadd.state.launch import Candidate, Footprint, ModelFacts, VramEstimate
from offloadd.state.observed import EngineView
from offloadd.units import Bytes, format_bytes

_UNKNOWN = "how much memory it needs cannot be worked out: its files are not on this disk"
_SAY_SO = "set vram, or have the model downloaded beforehand"


def make_offer(
    backend: Backend, engine: Engine, view: EngineView, spec: ModelSpec, facts: ModelFacts, footprints: Mapping[str, Footprint]
) -> Candidate:
    """The candidate: its fingerprint, and its need as learned, else as estimated; `vram` in the config wins over both."""
    mark = fingerprint(backend, engine, spec, facts)
    estimate = backend.estimate(spec, facts)
    key, former = footprint_key(backend, engine, view.version, spec, facts), _former_key(facts, mark, view.version)
    known = footprints.get(key) or footprints.get(former)
    if estimate is None:
        return Candidate(backend=engine.name, facts=facts, fingerprint=mark, problem=_UNKNOWN, hint=_SAY_SO)
    # What it took of its promise says nothing of what it needs, where it takes all that it is promised.
    if known is not None and spec.vram == "auto" and not estimate.elastic:
        estimate = as_learned(estimate, known.peak)
    return Candidate(
        backend=engine.name,
        facts=facts,
        fingerprint=mark,
        estimate=estimate,
        gpus=view.gpus,
        footprint_key=key,
        former_key=former if former in footprints else "",
    )


def footprint_key(backend: Backend, engine: Engine, version: str, spec: ModelSpec, facts: ModelFacts) -> str:
    """What a measured peak on a GPU depends on: the content of all files, the engine's version and the launch.

    Not where the files lie nor what the model is called: whoever renames a file need not have its memory learned again.
    """
    nameless = replace(facts, path="", companions={name: replace(each, path="") for name, each in facts.companions.items()})
    mark = fingerprint(backend, engine, replace(spec, name=ModelName("")), nameless)
    contents = (each.content or each.identity for each in (facts, *facts.companions.values()))
    return _hashed(*contents, version, mark)


def _former_key(facts: ModelFacts, mark: str, version: str) -> str:
    """The key before content was looked into."""
    return _hashed(facts.identity, version, mark)


def _hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def as_learned(estimate: VramEstimate, peak: Bytes) -> VramEstimate:
    """The estimate with its parts on GPUs scaled so that they sum to what was really taken."""
    if not estimate.total:
        return estimate
    scale = peak / estimate.total
    layers = tuple(Bytes(int(size * scale)) for size in estimate.layers)
    fixed = Bytes(peak - sum(layers)) if layers else estimate.fixed
    basis = f"measured on an earlier launch: {format_bytes(peak)} (estimated {format_bytes(estimate.total)})"
    return replace(estimate, total=peak, layers=layers, fixed=fixed, basis=basis, learned=True, estimated=estimate.total)
