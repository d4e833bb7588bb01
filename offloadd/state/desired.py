"""The desired side: what the config asks for, resolved and checked. One DesiredState per applied config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from offloadd.state.access import Access
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.wire import Wire
from offloadd.units import Bytes, Seconds, Share

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


class RunMode(StrEnum):
    """When a model runs: for ever, while requests want it, or not at all."""

    ALWAYS = "always"
    ON_DEMAND = "on-demand"
    NEVER = "never"


class OnStop(StrEnum):
    """What becomes of the servers when the daemon is told to end."""

    STOP = "stop"
    KEEP = "keep"
    """They run on, and the next daemon takes them over."""


class Origin(StrEnum):
    """Where a model comes from: an entry of the config, or a file that was found on disk."""

    CONFIGURED = "configured"
    DISCOVERED = "discovered"


class BackendKind(StrEnum):
    """How offloadd relates to an engine's process."""

    BUILTIN = "builtin"
    CUSTOM = "custom"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """Base of the typed options that one engine offers under a model; adapters subclass it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Exponential backoff between starts, and the number of failures in a row that ends trying."""

    backoff: Seconds = Seconds(1)
    max_backoff: Seconds = Seconds(300)
    give_up_after: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """How many requests may wait for a model at once, and for how long."""

    max_waiting: int = 64
    max_wait: Seconds = Seconds(120)
    hedge_after: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """How many instances of a model may run at once."""

    min: int = 1
    max: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """Changes made to a request's JSON body before it is forwarded."""

    set: Mapping[str, JsonValue] = field(default_factory=dict)
    default: Mapping[str, JsonValue] = field(default_factory=dict)
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.default or self.remove)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """How an instance that is ready is checked beyond its liveness probe."""

    canary: Seconds = Seconds(0)
    """After so long without a request it is asked for one token; 0 means never."""
    canary_timeout: Seconds = Seconds(30)
    """How long that may take."""
    rss_limit: Bytes = Bytes(0)
    """RAM of its own above which it is replaced at a request boundary; 0 means no ceiling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyRule:
    """How a custom or external engine says that it is ready: the status of a GET."""

    path: str = "/health"
    status: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine of the config's `backends`: how its server is started and ranked.

    `adapter` names the module in `offloadd/backends/` that speaks for it.
    """

    name: BackendName
    adapter: str
    kind: BackendKind = BackendKind.BUILTIN
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    preference: int = 9
    stop_command: tuple[str, ...] = ()
    """Ends a server that signals to `command` do not reach."""
    user: str = ""
    """Who its processes run as; empty for the daemon's own user."""
    group: str = ""
    """Their group; empty for the user's own."""
    ready: ReadyRule | None = None
    """How it says that it is ready; None leaves that to its adapter."""
    api: str = "/v1"
    """Custom engines: where the OpenAI API begins."""
    wire: Wire | None = None
    """Custom and external engines: their own JSON, where they do not speak OpenAI's."""
    url: str = ""
    """External engines: where the OpenAI API begins."""
    key: str = field(default="", repr=False)
    """External engines: the bearer token that it wants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model as the operator wants it served. Spans are seconds, sizes bytes, contexts tokens."""

    name: ModelName
    source: str
    backends: tuple[BackendName, ...]
    """Engines that may serve it, best first; already resolved, never empty."""
    sources: Mapping[BackendName, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    run: RunMode = RunMode.ON_DEMAND
    replicas: Replicas = field(default_factory=Replicas)
    idle_timeout: Seconds = Seconds(600)
    """Idle time after which an on-demand model is unloaded; 0 means never."""
    priority: int = 50
    pinned: bool = False
    context: int = 8192
    parallel: int = 4
    gpu_layers: int | Literal["auto", "all"] = "auto"
    partial: bool = False
    devices: tuple[str, ...] | Literal["auto", "cpu"] = "auto"
    vram: Bytes | Literal["auto"] = "auto"
    queue: QueueLimits = field(default_factory=QueueLimits)
    start_timeout: Seconds = Seconds(600)
    stop_timeout: Seconds = Seconds(30)
    drain_timeout: Seconds = Seconds(120)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    health: HealthPolicy = field(default_factory=HealthPolicy)
    request: RequestRules = field(default_factory=RequestRules)
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, BackendOptions] = field(default_factory=dict)
    """Typed engine options by adapter name; an adapter missing here means its defaults."""
    origin: Origin = Origin.CONFIGURED

    def source_for(self, backend: BackendName) -> str:
        """What this engine loads: its own source when one is given, else the model's."""
        return self.sources.get(backend, self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBudget:
    """How much of one device may be promised to instances: `limit` less `reserve`."""

    limit: Bytes | Share = Share(95)
    reserve: Bytes = Bytes(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory that may be used: the host's RAM, GPUs by default, and single GPUs by index or UUID."""

    host: DeviceBudget = field(default_factory=lambda: DeviceBudget(limit=Share(80)))
    gpu_default: DeviceBudget = field(default_factory=lambda: DeviceBudget(reserve=Bytes(512 * 2**20)))
    gpus: Mapping[str, DeviceBudget] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """Where the API listens, the Host names it answers to beside those addresses, who may call, and what an end leaves running."""

    listen: tuple[str, ...] = ("127.0.0.1:9000",)
    allowed_hosts: tuple[str, ...] = ()
    max_body: Bytes = Bytes(64 * 2**20)
    on_stop: OnStop = OnStop.STOP
    access: Access = field(default_factory=Access)
    insecure: bool = False
    """Whether addresses that a network reaches may do without keys."""

    @property
    def guarded(self) -> bool:
        """Whether addresses that a network reaches are all right."""
        return bool(self.access.keys) or self.insecure


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpec:
    """Folders: the daemon's own data, and where model files are looked for."""

    data_dir: str = "/var/lib/ml-offload"
    models_path: tuple[str, ...] = ("/var/lib/ml-models",)
    registry: str = field(default="", repr=False)
    """`postgresql://…` of a registry that several daemons share, password included; empty for a file in `data_dir`."""
    warm_next: bool = False
    """Whether the files of a model that may be next are read ahead while nothing else is to be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySpec:
    """Whether models on disk are looked for, where, and what becomes of them."""

    enabled: bool = True
    serve: bool = False
    stores: tuple[str, ...] | Literal["auto"] = "auto"
    """Folders beside `models_path`; `auto` are those of well-known programs."""
    defaults: ModelSpec = ModelSpec(name=ModelName(""), source="", backends=(), origin=Origin.DISCOVERED)
    """How each is run; its name, its source and its engines are filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """Everything one config asks for, and the models on disk if it asks for those too."""

    server: ServerSpec = field(default_factory=ServerSpec)
    storage: StorageSpec = field(default_factory=StorageSpec)
    budget: Budget = field(default_factory=Budget)
    engines: Mapping[BackendName, Engine] = field(default_factory=dict)
    models: Mapping[ModelName, ModelSpec] = field(default_factory=dict)
    discovery: DiscoverySpec = field(default_factory=DiscoverySpec)
    generation: int = 0
    """Counts applied configs; 0 before the first one."""
    closing: bool = False
    """The daemon is ending: nothing is wanted any more."""
