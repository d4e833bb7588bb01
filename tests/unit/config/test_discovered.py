"""What the config and the disk make together: pure, and the config goes first."""

from __future__ import annotations

from dataclasses import replace

from offloadd.backends import discover
from offloadd.backends.llamacpp import LlamaCppOptions
from offloadd.config import SourceText, SystemSecrets, load
from offloadd.config.discovered import Served, serve_found
from offloadd.state.desired import DesiredState, Origin
from offloadd.state.found import Format, Found
from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes

BACKENDS = discover()
SHAPE = ModelShape(architecture="llama", context_train=4096, chat_template=True)


def config(text: str = "discovery: {serve: true}") -> DesiredState:
    desired = load([SourceText("x.yaml", text)], backends=BACKENDS, secrets=SystemSecrets()).desired
    assert desired is not None
    return replace(desired, generation=7)


def facts(path: str, shape: ModelShape | None = SHAPE, problem: str = "") -> ModelFacts:
    return ModelFacts(path=path, size=Bytes(1), identity=path, shape=shape, problem=problem)


def found(name: str, **changes: object) -> Found:
    usual = {"name": ModelName(name), "store": "models_path", "format": Format.GGUF, "facts": facts(f"/m/{name}.gguf")}
    return Found(**{**usual, **changes})  # type: ignore[arg-type]


def serve(desired: DesiredState, *models: Found) -> Served:
    return serve_found(desired, {model.name: model for model in models}, BACKENDS)


def test_a_found_model_is_served_with_the_defaults() -> None:
    text = "discovery: {serve: true, defaults: {priority: 7, parallel: 3, llamacpp: {flash_attention: 'on'}}}"
    served = serve(config(text), found("a", aliases=("A", "org/A:Q4")))
    spec = served.desired.models[ModelName("a")]
    assert (spec.source, spec.backends, spec.origin, spec.aliases) == (
        "/m/a.gguf",
        ("llamacpp",),
        Origin.DISCOVERED,
        ("A", "org/A:Q4"),
    )
    assert (spec.priority, spec.parallel, spec.context) == (7, 3, 4096)  # no more context than it was trained on
    options = spec.options["llamacpp"]
    assert isinstance(options, LlamaCppOptions)
    assert (options.flash_attention, options.mmproj, options.lora, options.embeddings) == ("on", None, (), False)
    assert served.desired.generation == 7


def test_what_a_file_asks_for_is_set() -> None:
    embed = found("embed", facts=facts("/m/embed.gguf", ModelShape(architecture="bert", causal=False)))
    rank = found("rank", facts=facts("/m/rank.gguf", ModelShape(architecture="bert", pooling="rank")))
    see = found("see", projector=facts("/m/mmproj.gguf"))
    lora = found("lora", is_adapter=True, base=facts("/m/base.gguf"))
    models = serve(config(), embed, rank, see, lora).desired.models
    options = {name: spec.options["llamacpp"] for name, spec in models.items()}
    assert options["embed"].embeddings  # type: ignore[attr-defined]
    assert options["rank"].reranking  # type: ignore[attr-defined]
    assert options["see"].mmproj == "/m/mmproj.gguf"  # type: ignore[attr-defined]
    assert options["lora"].lora == ("/m/lora.gguf",)  # type: ignore[attr-defined]
    assert models[ModelName("lora")].source == "/m/base.gguf"


def test_an_adapter_in_the_hubs_layout_goes_to_the_engine_that_applies_it_over_its_base() -> None:
    shape = ModelShape(architecture="", kind="adapter", rank=40)
    lora = found("lora", format=Format.SAFETENSORS, facts=facts("/m/lora", shape), is_adapter=True, base=facts("/m/base"))
    desired = config("{discovery: {serve: true, defaults: {vllm: {lora: [x=/x], sleep: 2}}}}")
    spec = serve(desired, lora).desired.models[ModelName("lora")]
    assert (spec.backends, spec.source) == (("vllm",), "/m/base")
    assert spec.options["vllm"].lora == ("x=/x", "lora=/m/lora")  # type: ignore[attr-defined]
    assert (spec.options["vllm"].lora_rank, spec.options["vllm"].sleep) == (64, 1)  # type: ignore[attr-defined]


def test_what_is_the_same_still_is_not_worked_out_again() -> None:
    desired, a, b = config(), found("a"), found("b")
    before = serve(desired, a)
    both = {each.name: each for each in (a, b)}
    after = serve_found(desired, both, BACKENDS, before)
    assert after == serve_found(desired, both, BACKENDS)
    assert after.shelf[a.name].spec is before.shelf[a.name].spec
    other = replace(a, facts=facts("/m/a.gguf", replace(SHAPE, context_train=512)))
    changed = serve_found(desired, {a.name: other}, BACKENDS, after)
    assert changed == serve_found(desired, {a.name: other}, BACKENDS)
    reloaded = serve_found(config("discovery: {serve: true, defaults: {priority: 7}}"), both, BACKENDS, after)
    assert reloaded.desired.models[a.name].priority == 7


def test_safetensors_go_to_engines_that_read_folders() -> None:
    spec = serve(config(), found("a", format=Format.SAFETENSORS, facts=facts("/m/a"))).desired.models[ModelName("a")]
    assert "llamacpp" not in spec.backends
    assert "vllm" in spec.backends


def test_nothing_of_the_configured_models_changes() -> None:
    text = """
storage: {models_path: [/m, /n]}
discovery: {serve: true}
models:
  mine: {source: one.gguf}
  other: {source: /x/two.gguf, aliases: [taken]}
  hub: {source: org/name}
"""
    desired = config(text)
    served = serve(
        desired,
        found("one", facts=facts("/n/one.gguf")),
        found("two", facts=facts("/x/two.gguf")),
        found("taken"),
        found("name", format=Format.SAFETENSORS, facts=facts("/hub/x"), aliases=("org/name",)),
        found("new", aliases=("mine", "taken", "free")),
    )
    assert {name: spec for name, spec in served.desired.models.items() if name in desired.models} == desired.models
    assert list(served.desired.models)[: len(desired.models)] == list(desired.models)
    assert set(served.desired.models) - set(desired.models) == {"new"}
    assert served.desired.models[ModelName("new")].aliases == ("free",)
    assert set(served.shelf) == {"taken", "new"}
    assert "another model of this name" in served.shelf[ModelName("taken")].problem


def test_what_is_not_served_says_why_and_is_known_all_the_same() -> None:
    quiet = serve(config("discovery: {serve: false}"), found("a"))
    assert quiet.desired.models == {}
    assert "not served" in quiet.shelf[ModelName("a")].problem
    assert set(quiet.specs.models) == {"a"}  # what it would need is worked out
    cut = serve(config(), found("a", facts=facts("/m/a.gguf", None, "is truncated")), found("lost", is_adapter=True))
    assert cut.desired.models == {}
    assert cut.shelf[ModelName("a")].problem == "is truncated"
    assert "base model" in cut.shelf[ModelName("lost")].problem


def test_two_found_models_never_share_a_name_for_clients() -> None:
    served = serve(config(), found("a", aliases=("b", "same")), found("b", aliases=("same", "a")))
    models = served.desired.models
    assert (models[ModelName("a")].aliases, models[ModelName("b")].aliases) == (("same",), ())
