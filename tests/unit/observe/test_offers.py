"""An engine's offer: estimated, learned or configured."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from offloadd.backends.llamacpp import BACKEND
from offloadd.observe.offers import as_learned, make_offer
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import BackendName, DeviceKind, ModelName
from offloadd.state.launch import Candidate, Footprint, ModelFacts, VramEstimate
from offloadd.state.observed import EngineView
from offloadd.units import Bytes
from tests.unit.plan.build import gib

ENGINE = Engine(name=BackendName("llamacpp"), adapter="llamacpp", command=("llama-server",))
SPEC = ModelSpec(name=ModelName("a"), source="a.gguf", backends=(ENGINE.name,))
FACTS = ModelFacts(path="/m/a.gguf", size=gib(4), identity="1:2:3", content="abc")
SEEN = EngineView(name=ENGINE.name, version="b1", gpus=frozenset({DeviceKind.NVIDIA}))


def offer(
    known: dict[str, Footprint] | None = None, *, spec: ModelSpec = SPEC, facts: ModelFacts = FACTS, seen: EngineView = SEEN
) -> Candidate:
    return make_offer(BACKEND, ENGINE, seen, spec, facts, known or {})


def footprint(peak: int) -> Footprint:
    return Footprint(model=SPEC.name, backend=ENGINE.name, peak=Bytes(peak))


def test_an_estimate_where_nothing_was_learned() -> None:
    found = offer()
    assert found.estimate == BACKEND.estimate(SPEC, FACTS)
    assert found.gpus == SEEN.gpus
    assert found.fingerprint
    assert not found.problem


def test_what_was_learned_replaces_the_estimate() -> None:
    key = offer().footprint_key
    found = offer({key: footprint(gib(5)), "other": footprint(gib(9))})
    assert found.estimate is not None
    assert found.estimate.total == gib(5)
    assert found.estimate.learned
    assert found.estimate.basis.startswith("measured on an earlier launch: 5.0 GiB (estimated ")
    assert found.fingerprint == offer().fingerprint  # or what runs would be replaced for what it taught


def test_what_the_config_says_wins_over_both() -> None:
    spec = replace(SPEC, vram=gib(7))
    key = offer(spec=spec).footprint_key
    found = offer({key: footprint(gib(5))}, spec=spec)
    assert found.estimate is not None
    assert (found.estimate.total, found.estimate.learned) == (gib(7), False)


@pytest.mark.parametrize(
    "other",
    [
        {"facts": replace(FACTS, content="abd")},
        {"facts": replace(FACTS, content="", identity="1:2:4")},
        {"facts": replace(FACTS, companions={"p": ModelFacts(path="/m/p.gguf", content="p")})},
        {"seen": replace(SEEN, version="b2")},
        {"spec": replace(SPEC, context=SPEC.context * 2)},
        {"spec": replace(SPEC, parallel=SPEC.parallel + 1)},
        {"spec": replace(SPEC, gpu_layers=3)},
        {"spec": replace(SPEC, args=("--no-warmup",))},
    ],
)
def test_another_file_engine_or_launch_has_taught_nothing(other: dict[str, object]) -> None:
    key = offer().footprint_key
    found = offer({key: footprint(gib(5))}, **other)  # type: ignore[arg-type]
    assert found.footprint_key != key
    assert found.estimate is not None
    assert not found.estimate.learned


def test_a_renamed_or_copied_file_and_a_model_of_another_name_know_what_was_learned() -> None:
    beside = {"p": ModelFacts(path="/m/p.gguf", content="p")}
    before = replace(FACTS, companions=beside)
    key = offer(facts=before).footprint_key
    after = replace(before, path="/n/b.gguf", identity="9:9:9", companions={"p": replace(beside["p"], path="/n/p.gguf")})
    found = offer({key: footprint(gib(5))}, facts=after, spec=replace(SPEC, name=ModelName("b"), source="b.gguf"))
    assert found.estimate is not None
    assert found.estimate.learned
    assert found.fingerprint != offer(facts=before).fingerprint  # it is started otherwise all the same


def test_what_was_kept_under_the_key_of_an_older_offloadd_is_found_and_told() -> None:
    old = hashlib.sha256(f"1:2:3\0b1\0{offer().fingerprint}".encode()).hexdigest()[:32]
    found = offer({old: footprint(gib(5))})
    assert found.estimate is not None
    assert (found.estimate.learned, found.former_key) == (True, old)
    assert offer().former_key == ""


def test_parts_sum_to_what_was_measured() -> None:
    layers = tuple(Bytes(size) for size in (1001, 999, 1003, 17))
    estimate = VramEstimate(total=Bytes(sum(layers) + 500), basis="", layers=layers, fixed=Bytes(500), host=Bytes(7))
    for peak in (1, 350, 3520, 9999):
        found = as_learned(estimate, Bytes(peak))
        assert found.total == peak == sum(found.layers) + found.fixed
        assert min(*found.layers, found.fixed) >= 0
        assert found.host == 7
    whole = as_learned(VramEstimate(total=Bytes(10), basis="", fixed=Bytes(0)), Bytes(20))
    assert (whole.total, whole.layers) == (20, ())
    nothing = VramEstimate(total=Bytes(0), basis="")
    assert as_learned(nothing, Bytes(20)) is nothing
