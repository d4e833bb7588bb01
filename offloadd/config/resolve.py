"""References between parts of a config, rules across them, and the DesiredState that comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from offloadd.backends.base import Backend
from offloadd.config.decode import MAX_REPORTED, Decoded
from offloadd.config.diagnostics import Diagnostic, did_you_mean, error, warning
from offloadd.config.door import access, check_door
from offloadd.config.engines import Builtin, builtins, can_read, is_hub_id
from offloadd.config.known import MODELS, Basis, Former, Known
from offloadd.config.nodes import Node, Path, find
from offloadd.config.notes import notes
from offloadd.config.owned import owned_flag, owned_variable
from offloadd.config.pins import unpinned
from offloadd.config.schema import (
    BackendSection,
    BudgetSection,
    ConfigFile,
    Discovery,
    GpuBudget,
    ModelSection,
    ModelSettings,
    Server,
    Storage,
)
from offloadd.config.section import Section
from offloadd.config.sections import config_model, to_options
from offloadd.config.wires import to_wire
from offloadd.state.desired import (
    BackendKind,
    BackendOptions,
    Budget,
    DesiredState,
    DeviceBudget,
    DiscoverySpec,
    Engine,
    HealthPolicy,
    ModelSpec,
    Origin,
    QueueLimits,
    ReadyRule,
    Replicas,
    RequestRules,
    RestartPolicy,
    ServerSpec,
    StorageSpec,
)
from offloadd.state.ids import BackendName, ModelName

Trouble = Callable[[str, str], tuple[str, str] | None]
"""Given a user's and a group's name: why this machine cannot run an engine as them, and what to do; None when it can."""


@dataclass(slots=True)
class Resolved:
    """The state, what was found on the way to it, and what the entries of `models` depend on."""

    desired: DesiredState | None = None
    found: list[Diagnostic] = field(default_factory=list)
    basis: Basis = field(default_factory=Basis)
    spoken_of: set[str] = field(default_factory=set)
    """Models of which something was found."""


def resolve(
    decoded: Decoded,
    root: Node,
    backends: Mapping[str, Backend],
    same: Mapping[str, Known] | None = None,
    former: Former | None = None,
    trouble: Trouble | None = None,
) -> Resolved:
    """Check what `decode` left and make the state of it; only a whole config's state is worth keeping.

    Of models that are the `same` as in the `former` config, among the same engines, there is nothing new to find.
    With `trouble`, users of engines are looked up too. What is wrong with them is a warning: a machine changes, a text does not.
    """
    if decoded.config is None:
        return Resolved()
    scope = _Scope(decoded.config, decoded, root, backends)
    basis = Basis(config_model(backends), tuple(scope.preferences.items()), decoded.config.storage.require_pinned)
    known = {} if same is None or former is None or former.basis != basis else same
    spoken_of: set[str] = set()
    models: dict[ModelName, ModelSpec] = {}
    for name, section in decoded.config.models.items():
        said = len(scope.found)
        models[ModelName(name)] = known[name].spec if name in known else _model(scope, name, section)
        if len(scope.found) > said:
            spoken_of.add(name)
    _check_backends(scope)
    if trouble is not None:
        _check_users(scope, trouble)
    _check_names(scope)
    _check_budget(scope)
    scope.found.extend(check_door(decoded.config.server, decoded, root))
    for where, found in notes(decoded.config, root, known):
        scope.found.append(found)
        if where[0] == MODELS:
            spoken_of.add(str(where[1]))
    if not decoded.config.models and not decoded.config.discovery.serve and not decoded.problems:
        scope.found.append(warning(root.mark, "no models: whatever runs will be stopped"))
    named = {name for spec in models.values() for name in spec.backends}
    state = DesiredState(
        server=_server(decoded.config.server),
        storage=_storage(decoded.config.storage),
        budget=_budget(decoded.config.budget),
        engines=_engines(scope, named),
        models=models,
        discovery=_discovery(scope, decoded.config.discovery),
    )
    return Resolved(state, scope.found, basis, spoken_of)


def _server(section: Server) -> ServerSpec:
    return ServerSpec(
        listen=section.listen,
        allowed_hosts=section.allowed_hosts,
        max_body=section.max_body,
        on_stop=section.on_stop,
        access=access(section),
        insecure=section.insecure,
    )


def _storage(section: Storage) -> StorageSpec:
    return StorageSpec(
        data_dir=section.data_dir,
        models_path=section.models_path,
        registry=section.registry or "",
        warm_next=section.warm_next,
    )


@dataclass(slots=True)
class _Scope:
    """What every check looks at, and where it leaves what it found."""

    config: ConfigFile
    decoded: Decoded
    root: Node
    backends: Mapping[str, Backend]
    found: list[Diagnostic] = field(default_factory=list)
    builtin: dict[str, Builtin] = field(init=False)
    engine_names: list[str] = field(init=False)
    preferences: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.builtin = builtins(self.backends)
        # From the tree, so that an entry with a mistake in it does not make every model that names it wrong too.
        written, reached = find(self.root, ("backends",))
        keys = written.node.value if reached and isinstance(written.node.value, dict) else {}
        self.engine_names = list(dict.fromkeys((*self.builtin, *keys)))
        self.preferences = {name: _preference(self, name) for name in self.engine_names}

    def node(self, *path: str | int) -> Node:
        """The value written at `path`."""
        return find(self.root, path)[0].node

    def written(self, *path: str | int) -> str:
        """That value's text, references not filled in: the only form that a message may quote."""
        return str(self.node(*path).value)[:80]

    def error(self, path: Path, message: str, hint: str = "", *, key: bool = False) -> None:
        """Report at the value, or at its key."""
        entry, _ = find(self.root, path)
        self.found.append(error(entry.key if key else entry.node.mark, message, hint))


def _model(scope: _Scope, name: str, section: ModelSection) -> ModelSpec:
    path = ("models", name)
    _check_owned(scope, path, section.args, section.env)
    _check_idle(scope, path, section)
    spec = replace(
        _settings(scope, section),
        name=ModelName(name),
        source=section.source,
        backends=_engines_of(scope, name, section),
        sources={BackendName(engine): source for engine, source in section.sources.items()},
        aliases=section.aliases,
    )
    _check_pins(scope, path, spec)
    return spec


def _check_pins(scope: _Scope, path: Path, spec: ModelSpec) -> None:
    adapters = {BackendName(name): each.adapter.name for name, each in scope.builtin.items()}
    required = scope.config.storage.require_pinned
    for found in unpinned(spec, adapters, lambda source: is_hub_id(source, scope.backends), required=required):
        where = (*path, found.adapter, "revision") if found.written else (*path, "source")
        message = f"{spec.name} may be another tomorrow, and {found.why}"
        scope.error(where, message, f"set {found.adapter}.revision to a commit of 40 hex digits, or give a folder on disk")


def _discovery(scope: _Scope, section: Discovery) -> DiscoverySpec:
    path = ("discovery", "defaults")
    _check_owned(scope, path, section.defaults.args, section.defaults.env)
    _check_idle(scope, path, section.defaults)
    defaults = replace(_settings(scope, section.defaults), origin=Origin.DISCOVERED)
    return DiscoverySpec(enabled=section.enabled, serve=section.serve, stores=section.stores, defaults=defaults)


def _check_idle(scope: _Scope, path: Path, section: ModelSettings) -> None:
    if "idle_timeout" in section.model_fields_set and section.run != "on-demand":
        mark = find(scope.root, (*path, "idle_timeout"))[0].key
        scope.found.append(warning(mark, f"idle_timeout has no effect with run: {section.run}"))


def _settings(scope: _Scope, section: ModelSettings) -> ModelSpec:
    """What `models` and `discovery.defaults` have in common; the rest is left empty."""
    return ModelSpec(
        name=ModelName(""),
        source="",
        backends=(),
        run=section.run,
        replicas=Replicas(min=section.replicas.min, max=section.replicas.max),
        idle_timeout=section.idle_timeout,
        priority=section.priority,
        pinned=section.pinned,
        context=section.context,
        parallel=section.parallel,
        gpu_layers=section.gpu_layers,
        partial=section.partial,
        devices=section.devices,
        vram=section.vram,
        queue=QueueLimits(
            max_waiting=section.queue.max_waiting, max_wait=section.queue.max_wait, hedge_after=section.queue.hedge_after
        ),
        start_timeout=section.start_timeout,
        stop_timeout=section.stop_timeout,
        drain_timeout=section.drain_timeout,
        restart=RestartPolicy(
            backoff=section.restart.backoff,
            max_backoff=section.restart.max_backoff,
            give_up_after=section.restart.give_up_after,
        ),
        health=HealthPolicy(
            canary=section.health.canary,
            canary_timeout=section.health.canary_timeout,
            rss_limit=section.health.rss_limit,
        ),
        request=RequestRules(set=section.request.set, default=section.request.default, remove=section.request.remove),
        args=section.args,
        env=section.env,
        options=dict(_options(scope, section)),
    )


def _options(scope: _Scope, section: ModelSettings) -> Iterator[tuple[str, BackendOptions]]:
    for name, adapter in scope.backends.items():
        written = getattr(section, name, None)
        if isinstance(written, Section):
            yield name, to_options(written, adapter.options)


def _engines_of(scope: _Scope, model: str, section: ModelSection) -> tuple[BackendName, ...]:
    path = ("models", model)
    if not all(scope.decoded.is_whole((*path, part)) for part in ("source", "sources", "backends")):
        return ()
    for engine in section.sources:
        if engine not in scope.engine_names:
            scope.error((*path, "sources", engine), _unknown_backend(engine, engine, scope), key=True)
    if section.backends is None:
        return _default_engines(scope, path, section)
    for index, engine in enumerate(section.backends):
        _check_engine(scope, (*path, "backends", index), engine, section)
    return tuple(BackendName(engine) for engine in section.backends)


def _check_engine(scope: _Scope, path: Path, engine: str, section: ModelSection) -> None:
    if engine not in scope.engine_names:
        scope.error(path, _unknown_backend(engine, scope.written(*path), scope))
        return
    known = scope.builtin.get(engine)
    if known is None:
        return
    if is_hub_id(section.sources.get(engine, section.source), scope.backends) and not known.adapter.reads_hub_ids:
        # Only this is sure. A file may have any ending, and whoever names an engine for it may know better.
        message = f"{known.adapter.title} loads files ({', '.join(known.adapter.reads)}), and the source is a hub id"
        scope.error(path, message, f"give it a file of its own: sources: {{{engine}: …}}")


def _default_engines(scope: _Scope, path: Path, section: ModelSection) -> tuple[BackendName, ...]:
    """Every engine that can read what it would be given, the preferred one first."""
    ranked = sorted(scope.engine_names, key=lambda name: (scope.preferences[name], name))
    chosen = [name for name in ranked if _offers(scope, name, section)]
    if not chosen:
        readable = "; ".join(
            f"{one.name} reads {', '.join(one.adapter.reads)}" for one in scope.builtin.values() if one.adapter.reads
        )
        message = f'no engine can read "{scope.written(*path, "source")}" ({readable})'
        scope.error((*path, "source"), message, "name the engine that can: backends: […]")
    return tuple(BackendName(name) for name in chosen)


def _offers(scope: _Scope, name: str, section: ModelSection) -> bool:
    if name not in scope.builtin:
        return name in section.sources
    return can_read(scope.builtin[name], section.sources.get(name, section.source), scope.backends)


def _unknown_backend(name: str, written: str, scope: _Scope) -> str:
    # Looking for near names takes long, and a text that is all mistakes gets none of them read.
    near = did_you_mean(name, scope.engine_names) if len(scope.found) < MAX_REPORTED else ""
    return f'unknown backend "{written}"{near or _known(scope)}'


def _known(scope: _Scope) -> str:
    return f" (known: {', '.join(scope.engine_names[:20])})"


def _check_owned(scope: _Scope, path: Path, args: tuple[str, ...], env: Mapping[str, str]) -> None:
    for index, argument in enumerate(args):
        owned = owned_flag(argument)
        if owned:
            scope.error((*path, "args", index), f"{owned[0]} must not be set here", owned[1])
    for variable in env:
        instead = owned_variable(variable)
        if instead:
            scope.error((*path, "env", variable), f"{variable} must not be set here", instead, key=True)


def _check_backends(scope: _Scope) -> None:
    for name, section in scope.config.backends.items():
        path = ("backends", name)
        if section.kind is None and name not in scope.builtin and scope.decoded.is_whole(path):
            near = did_you_mean(name, scope.builtin)
            hint = "an engine of your own says kind: custom or kind: external"
            scope.error(path, f'there is no built-in engine "{name}"{near}', hint, key=True)
        elif section.kind is not None and name in scope.builtin:
            scope.error((*path, "kind"), f'"{name}" is built in and has no kind', "take another name for an engine of your own")
        elif name in scope.builtin:
            _check_owned(scope, path, section.args, section.env)


def _check_users(scope: _Scope, trouble: Trouble) -> None:
    for name, section in scope.config.backends.items():
        found = trouble(section.user, section.group or "") if section.user else None
        if found is not None:
            message, hint = found
            scope.found.append(warning(scope.node("backends", name, "user").mark, f"{message}; it would not be started", hint))


def _check_names(scope: _Scope) -> None:
    """A client's name for a model leads to one model only."""
    owners: dict[str, tuple[str, Path]] = {name: (name, ("models", name)) for name in scope.config.models}
    for name, section in scope.config.models.items():
        for index, alias in enumerate(section.aliases):
            path: Path = ("models", name, "aliases", index)
            owner, there = owners.setdefault(alias, (name, path))
            if there != path:
                first = find(scope.root, there)[0].key
                what = "the name of a model" if len(there) == 2 else f'also an alias of "{owner}"'
                scope.error(path, f'alias "{scope.written(*path)}" is {what}, at {first}')


def _check_budget(scope: _Scope) -> None:
    _check_reserve(scope, ("budget", "host"), scope.config.budget.host.limit, scope.config.budget.host.reserve)
    for name, gpu in scope.config.budget.gpus.items():
        _check_reserve(scope, ("budget", "gpus", name), gpu.limit, gpu.reserve if "reserve" in gpu.model_fields_set else 0)


def _check_reserve(scope: _Scope, path: Path, limit: object, reserve: int) -> None:
    if isinstance(limit, int) and reserve > limit:
        scope.error((*path, "reserve"), "reserve is more than limit, so nothing would be left", "lower it, or set limit: 0")


def _budget(section: BudgetSection) -> Budget:
    default = _device(section.gpus.get("default", GpuBudget()), Budget().gpu_default)
    return Budget(
        host=DeviceBudget(limit=section.host.limit, reserve=section.host.reserve),
        gpu_default=default,
        gpus={name: _device(gpu, default) for name, gpu in section.gpus.items() if name != "default"},
    )


def _device(section: GpuBudget, default: DeviceBudget) -> DeviceBudget:
    """What is not written is as in `default`."""
    written = section.model_fields_set
    return DeviceBudget(
        limit=section.limit if "limit" in written else default.limit,
        reserve=section.reserve if "reserve" in written else default.reserve,
    )


def _engines(scope: _Scope, named: set[BackendName]) -> dict[BackendName, Engine]:
    """Every engine that can be started, and every other one that the config mentions."""
    found: dict[BackendName, Engine] = {}
    for name in map(BackendName, scope.engine_names):
        written = scope.config.backends.get(name)
        if written or name in named or name in scope.backends:
            found[name] = _engine(scope, name, written or BackendSection())
    return found


def _engine(scope: _Scope, name: BackendName, section: BackendSection) -> Engine:
    builtin = scope.builtin.get(name)
    inference = section.inference
    return Engine(
        name=name,
        adapter=name if builtin else str(section.kind),
        kind=BackendKind(section.kind or "builtin"),
        command=section.command or (builtin.command if builtin else ()),
        args=section.args,
        env=section.env,
        preference=scope.preferences[name],
        stop_command=section.stop_command or (),
        user=section.user or "",
        group=section.group or "",
        ready=ReadyRule(path=section.health.path, status=section.health.ready_status) if section.health else None,
        api=(inference.path if inference and not inference.format else "/v1").rstrip("/"),
        wire=to_wire(inference.path, inference.format) if inference and inference.format else None,
        url=section.url or "",
        key=section.key or "",
    )


def _preference(scope: _Scope, name: str) -> int:
    written = scope.config.backends.get(name)
    if written is not None and written.preference is not None:
        return written.preference
    return scope.builtin[name].preference if name in scope.builtin else Engine(name=BackendName(name), adapter="").preference
