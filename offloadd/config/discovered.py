"""What is served: the config's own models, and those on disk where the config asks for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from offloadd.backends.base import Backend, SuitsFiles
from offloadd.state.desired import BackendKind, BackendOptions, DesiredState, Engine, ModelSpec
from offloadd.state.found import Format, Found
from offloadd.state.ids import BackendName, ModelName

GGUF = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """A model on disk as it would be served; `problem` says why it is not."""

    spec: ModelSpec
    found: Found
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the config and the disk make together."""

    desired: DesiredState = field(default_factory=DesiredState)
    config: DesiredState | None = None
    """The config alone."""
    shelf: Mapping[ModelName, Shelved] = field(default_factory=dict)
    """Every model on disk that no entry of the config is about, served or not."""
    specs: DesiredState = field(default_factory=DesiredState)
    """As if all on the shelf were served, those with a problem aside: to work out what each would need."""


def serve_found(
    config: DesiredState, found: Mapping[ModelName, Found], backends: Mapping[str, Backend], before: Served | None = None
) -> Served:
    """The config's models as they are, with those on disk beside them if it says `discovery.serve`.

    Of `before` is taken what is the same still: one file more among thousands is then no work worth speaking of.
    """
    known = before.shelf if before is not None and before.config is config else {}
    named = frozenset(_paths(config))
    taken = {name for spec in config.models.values() for name in (spec.name, *spec.aliases)}
    shelf: dict[ModelName, Shelved] = {}
    for name in sorted(found, key=lambda each: (bool(found[each].facts.problem), each)):
        each = found[name]
        if not each.is_adapter and (each.path in named or not named.isdisjoint(each.aliases)):
            continue
        aliases = tuple(alias for alias in each.aliases if alias not in taken and alias not in found)
        held = known.get(name)
        same = held is not None and held.found is each and held.spec.aliases == aliases
        spec = held.spec if held is not None and same else _spec(config, each, aliases, backends)
        problem, hint = _problem(config, each, spec, shadowed=name in taken)
        shelf[name] = Shelved(spec=spec, found=each, problem=problem, hint=hint)
        taken.update((name, *aliases))
    served = {name: each.spec for name, each in shelf.items() if not each.problem} if config.discovery.serve else {}
    desired = replace(config, models={**config.models, **served}) if config.discovery.serve else config
    sound = {name: each.spec for name, each in shelf.items() if each.spec.backends}
    return Served(desired=desired, config=config, shelf=shelf, specs=replace(config, models={**sound, **desired.models}))


def _spec(config: DesiredState, found: Found, aliases: tuple[str, ...], backends: Mapping[str, Backend]) -> ModelSpec:
    defaults = config.discovery.defaults
    shape = found.loaded.shape
    longest = shape.context_train if shape else 0
    ranked = sorted(config.engines.values(), key=lambda engine: (engine.preference, engine.name))
    engines = [engine for engine in ranked if not found.loaded.problem and _can_read(engine, found, backends)]
    return replace(
        defaults,
        name=found.name,
        source=found.loaded.path,
        backends=tuple(BackendName(engine.name) for engine in engines),
        aliases=aliases,
        # What a model was not trained on is no use to anybody, and would take memory.
        context=min(defaults.context, longest) if longest else defaults.context,
        options=dict(_options(defaults, found, engines, backends)),
    )


def _options(
    defaults: ModelSpec, found: Found, engines: Iterable[Engine], backends: Mapping[str, Backend]
) -> Iterable[tuple[str, BackendOptions]]:
    yield from defaults.options.items()
    for engine in engines:
        adapter = backends[engine.adapter]
        if isinstance(adapter, SuitsFiles):
            yield engine.adapter, adapter.suit(defaults.options.get(engine.adapter), found)


def _can_read(engine: Engine, found: Found, backends: Mapping[str, Backend]) -> bool:
    adapter = backends.get(engine.adapter)
    if adapter is None or engine.kind is not BackendKind.BUILTIN:
        return False
    if found.is_adapter and not isinstance(adapter, SuitsFiles):
        return False
    if found.format is Format.GGUF:
        return GGUF in adapter.reads
    return adapter.reads_hub_ids or not adapter.reads


def _problem(config: DesiredState, found: Found, spec: ModelSpec, *, shadowed: bool) -> tuple[str, str]:
    if found.facts.problem:
        return found.facts.problem, found.facts.hint
    if found.is_adapter and found.base is None:
        return "its base model was not found", "put the base model beside it"
    if shadowed:
        return "the config has another model of this name", "rename the file, or the model in the config"
    if not spec.backends:
        return f"no engine here can read {found.format}", "configure one that does: offloadctl backends lists them"
    if not config.discovery.serve:
        return "found on disk and not served", "set discovery.serve: true, or name it in models"
    return "", ""


def _paths(config: DesiredState) -> Iterable[str]:
    """Every file that the config's models are about, wherever it is looked for."""
    for spec in config.models.values():
        for source in {spec.source, *spec.sources.values()}:
            yield source  # a path, or a hub id
            if not source.startswith("/"):
                yield from (f"{folder.rstrip('/')}/{source}" for folder in config.storage.models_path)
