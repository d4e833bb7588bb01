"""The config file as its author writes it: every field with its type, its default and what it means.

A doc string here is the field's description in the published JSON Schema. Defaults come from `state/desired.py`.
A field marked `NotYet` is read and checked, and `offloadd check` says that this version does nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from offloadd.config import fields
from offloadd.config.fields import refused
from offloadd.config.section import Section
from offloadd.config.wires import Format
from offloadd.state.desired import (
    Budget,
    DiscoverySpec,
    HealthPolicy,
    ModelSpec,
    OnStop,
    QueueLimits,
    Replicas,
    RestartPolicy,
    RunMode,
    ServerSpec,
    StorageSpec,
)
from offloadd.state.ids import ModelName
from offloadd.units import format_seconds

_SERVER = ServerSpec()
_STORAGE = StorageSpec()
_BUDGET = Budget()
_MODEL = ModelSpec(name=ModelName(""), source="", backends=())
_QUEUE = QueueLimits()
_RESTART = RestartPolicy()
_HEALTH = HealthPolicy()
_REPLICAS = Replicas()
_DISCOVERY = DiscoverySpec()


@dataclass(frozen=True)
class NotYet:
    """Marks a field that this version reads and does not act on; `when` narrows that to some of its values."""

    message: str
    when: Callable[[Any], bool] = lambda value: value is not None


class AuthLimits(Section):
    """How much one key may use. What is not written has no limit of its own."""

    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests to models; more are refused with 429."""
    tokens_per_minute: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Tokens of prompts and answers, as engines count them."""
    parallel: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests at once, those that wait included."""


class AuthKey(Section):
    """One API key, and what it opens."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """What logs and metrics call it."""
    key: Annotated[str, Field(min_length=1, max_length=4096)]
    """The secret itself; better `${file:/path}` or `${env:NAME}`."""
    scopes: Annotated[tuple[Literal["admin", "inference", "read"], ...], Strict(False), Field(min_length=1)] = ("inference",)
    """`inference` for requests to models, `read` for looking, `admin` for everything."""
    models: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] = ("*",)
    """Models that it may use, by name or pattern."""
    limits: AuthLimits = Field(default_factory=lambda: AuthLimits())
    """How much it may use."""


class Auth(Section):
    """Who may call."""

    keys: Annotated[tuple[AuthKey, ...], Strict(False), Field(max_length=1024)] = ()
    """API keys; none means that whoever reaches the address may do everything."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise refused("two keys have the same name", at="keys")
        return self


class Server(Section):
    """The API's own side."""

    listen: fields.Listen = _SERVER.listen
    """Addresses: `host:port`, `[::1]:9000` or `unix:/path`. Sockets passed by systemd win."""
    allowed_hosts: Annotated[tuple[fields.HostName, ...], Strict(False)] = _SERVER.allowed_hosts
    """`Host` names that are answered, beside loopback and the listen addresses."""
    max_body: fields.Size = _SERVER.max_body
    """The largest body of a request; pictures and sound come within it. Taken up at a restart."""
    on_stop: Annotated[OnStop, Strict(False)] = _SERVER.on_stop
    """What an end of the daemon does to the servers: `stop` them, or `keep` them running for the next daemon to take over."""
    auth: Auth = Auth()
    """API keys."""
    insecure: bool = False
    """Whether an address that a network reaches may be opened without keys. Everybody there may then do everything."""
    media_hosts: Annotated[tuple[fields.HostName, ...], Strict(False)] = ()
    """Hosts from which engines may fetch images, audio and video that requests point to; none unless written."""
    cors_origins: fields.Origins = ()
    """Sites whose pages may call from a browser, such as `https://chat.example`; none unless written."""


class Storage(Section):
    """Folders."""

    data_dir: fields.AbsolutePath = _STORAGE.data_dir
    """The daemon's own data."""
    models_path: fields.Paths = _STORAGE.models_path
    """Where a model's `source` is looked for, in this order."""
    registry: fields.RegistryUrl | None = None
    """`postgresql://user:${file:/path}@host/name` for a registry that several daemons share; default: a file in `data_dir`."""
    warm_next: bool = _STORAGE.warm_next
    """Whether the files of the on-demand model that was used last and is not loaded are read into the page cache, so that it loads
    quicker. This is done while nothing loads or waits and RAM is free."""
    require_pinned: bool = False
    """Whether a `source` that is a name on a hub needs the engine's `revision`, a commit of 40 hex digits. Where the model's own
    code is run (`trust_remote_code`) it always does."""


class HostBudget(Section):
    """How much of the machine's RAM instances may take."""

    limit: fields.SizeOrShare = _BUDGET.host.limit
    """A size, or a share of the whole."""
    reserve: fields.Size = _BUDGET.host.reserve
    """Kept free within the limit."""


class GpuBudget(Section):
    """How much of a GPU's memory instances may take. What one GPU leaves out is as under `default`."""

    limit: fields.SizeOrShare = _BUDGET.gpu_default.limit
    """A size, or a share of the whole; 0 keeps the GPU free."""
    reserve: fields.Size = _BUDGET.gpu_default.reserve
    """Kept free within the limit, for what the driver and the desktop take."""


class BudgetSection(Section):
    """Memory that may be promised to instances."""

    gpus: dict[fields.GpuKey, GpuBudget] = Field(default_factory=dict)
    """Per GPU: by index, by UUID, or `default` for all others."""
    host: HostBudget = HostBudget()
    """RAM, the only device on a machine with no GPU."""


class CustomHealth(Section):
    """How to ask an engine of one's own whether it is ready."""

    path: fields.UrlPath = "/health"
    """Path of an HTTP GET."""
    ready_status: Annotated[int, Field(ge=100, le=599)] = 200
    """The status that means ready."""


class CustomInference(Section):
    """What the API of an engine of one's own looks like."""

    path: fields.UrlPath = "/v1"
    """Where its OpenAI API begins, in place of `/v1`; with a format of its own, where requests are posted."""
    format: Format = None
    """`openai`, or where things stand in JSON of its own: a chat or text API of any other shape."""

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        if self.format is not None and "path" not in self.model_fields_set:
            raise refused("needs path beside it: where requests are posted", at="format")
        return self


class BackendSection(Section):
    """One engine. Built-in ones need no entry; others say of which `kind` they are."""

    kind: Literal["custom", "external"] | None = None
    """`custom`: a program that we start by `command`. `external`: a server that runs elsewhere, at `url`."""
    command: fields.Command | None = None
    """Program and leading arguments. `${port}`, `${source}` and `${model}` are filled in when it starts."""
    stop_command: fields.Command | None = None
    """Ends the server where signals to `command` do not reach it, as in `podman stop …`; `${port}` and `${model}` as there."""
    args: fields.Words = ()
    """Arguments for every model, appended as they are."""
    env: fields.Environment = Field(default_factory=dict)
    """Environment variables for every model."""
    user: fields.AccountName | None = None
    """Runs its processes as this user, in whose groups they are, and in `video` and `render`. The daemon must be root, or have the
    capabilities of `systemd/drop-ins/engine-users.conf`; default: the daemon's own user."""
    group: fields.AccountName | None = None
    """Their group, in place of the user's own."""
    preference: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Breaks ties between engines: the lowest wins. Built-in engines bring their own, others have 9."""
    health: CustomHealth | None = None
    """Custom engines: how to ask whether it is ready. External ones too, where any answer but a failure does not mean that."""
    inference: CustomInference | None = None
    """Custom engines: what its API looks like. External ones too, where they do not speak OpenAI's."""
    url: fields.Url | None = None
    """External engines: where its API begins."""
    key: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """External engines: the key that it wants; better `${file:/path}`."""

    @model_validator(mode="after")
    def _kinds_fit(self) -> Self:
        needs = {"custom": "command", "external": "url"}.get(self.kind or "")
        if needs and getattr(self, needs) is None:
            raise refused(f'an engine of kind "{self.kind}" needs {needs}', at="kind")
        foreign = {"custom": ("url", "key"), "external": ("command", "stop_command", "args", "env", "user", "group")}
        for name in foreign.get(self.kind or "", ("health", "inference", "url", "key")):
            if name in self.model_fields_set:
                raise refused(f"does not belong to {_kind_title(self.kind)}", at=name)
        if self.kind == "external" and self.inference is not None and self.inference.format is None:
            raise refused("says nothing here: url is where an OpenAI API begins", at="inference")
        if self.group is not None and self.user is None:
            raise refused("a group needs a user", at="group")
        return self


class ReplicaRange(Section):
    """How many instances may run at once."""

    min: Annotated[int, Field(ge=0, le=64)] = _REPLICAS.min
    """Kept running whenever the model runs at all."""
    max: Annotated[int, Field(ge=1, le=64)] = _REPLICAS.max
    """Never more than these."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise refused(f"{self.min} is more than max, which is {self.max}", at="min")
        return self


class Queue(Section):
    """Requests that wait for the model."""

    max_waiting: Annotated[int, Field(ge=1, le=100_000)] = _QUEUE.max_waiting
    """How many may wait at once; more are refused with 429."""
    max_wait: fields.Time = _QUEUE.max_wait
    """How long one may wait before it is answered with 504."""
    hedge_after: fields.PositiveTime | None = None
    """When a request's instance has not begun to answer after this time, another one of the same engine is asked too, if it has a
    free slot (see `replicas`): the first to begin is the answer, and the other is left. Costs work that is done twice."""


class Restart(Section):
    """What happens after a failed start or a crash."""

    backoff: fields.PositiveTime = _RESTART.backoff
    """Wait before the first restart; doubled with every failure in a row."""
    max_backoff: fields.PositiveTime = _RESTART.max_backoff
    """The longest such wait."""
    give_up_after: Annotated[int, Field(ge=1, le=10_000)] = _RESTART.give_up_after
    """Failures in a row after which the model stays off until its config changes."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_backoff < self.backoff:
            longest, first = format_seconds(self.max_backoff), format_seconds(self.backoff)
            if "max_backoff" in self.model_fields_set:
                raise refused(f"{longest} is less than backoff, which is {first}", at="max_backoff")
            raise refused(f"{first} is more than max_backoff, which is {longest}", at="backoff")
        return self


class Health(Section):
    """How an instance that is ready is checked, beyond the probe of its working loop."""

    canary: fields.TimeOrOff = _HEALTH.canary
    """After so long without a request it is asked for one token, and replaced when it gives none; `off` never asks."""
    canary_timeout: fields.PositiveTime = _HEALTH.canary_timeout
    """How long that may take. It is asked twice before it is replaced."""
    rss_limit: fields.SizeOrNone = _HEALTH.rss_limit
    """RAM of its own, without what the page cache holds of its files, above which a fresh instance takes its place; `none` has no
    ceiling. Requests that run may end first."""


class RequestSection(Section):
    """Changes to a request's JSON body before it reaches the engine."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Fields that are overwritten; any JSON value."""
    default: dict[str, Any] = Field(default_factory=dict)
    """Fields that are added where the request has none; any JSON value."""
    remove: Annotated[tuple[str, ...], Strict(False)] = ()
    """Fields that are dropped."""


class ModelSettings(Section):
    """How a model is run, apart from what it is."""

    run: Annotated[RunMode, Strict(False)] = _MODEL.run
    """`always`, `on-demand` (while requests want it) or `never`."""
    replicas: Annotated[ReplicaRange, fields.SameBoth] = ReplicaRange()
    """How many instances run: a number, or `{min: 0, max: 3}`. More than min run while requests wait, as far as there is room."""
    idle_timeout: fields.Time = _MODEL.idle_timeout
    """On-demand only: unloaded after this time without a request; 0 means never."""
    priority: Annotated[int, Field(ge=0, le=100)] = _MODEL.priority
    """A model of higher priority may evict one of lower."""
    pinned: bool = _MODEL.pinned
    """Never evicted."""
    context: Annotated[int, Field(ge=1, le=16_777_216)] = _MODEL.context
    """Tokens per sequence."""
    parallel: Annotated[int, Field(ge=1, le=1024)] = _MODEL.parallel
    """Sequences at once."""
    gpu_layers: fields.Layers = _MODEL.gpu_layers
    """llama.cpp: layers on the GPU. `auto` is as many as fit when `partial` is true, else all or none."""
    partial: bool = _MODEL.partial
    """Whether it may run with only a part of its layers on the GPU."""
    devices: fields.Devices = _MODEL.devices
    """`auto`, `cpu`, or a list of GPU indexes or UUIDs."""
    vram: fields.SizeOrAuto = _MODEL.vram
    """Memory of one instance. `auto` is what was learned, else estimated; a size wins over both."""
    queue: Queue = Queue()
    """Requests that wait for the model."""
    start_timeout: fields.PositiveTime = _MODEL.start_timeout
    """From start to ready; after that the start has failed."""
    stop_timeout: fields.Time = _MODEL.stop_timeout
    """From a polite request to end until it is killed."""
    drain_timeout: fields.Time = _MODEL.drain_timeout
    """How long running requests may go on once an instance is to stop."""
    restart: Restart = Restart()
    """What happens after a failed start or a crash."""
    health: Health = Health()
    """How it is checked while it is ready."""
    request: RequestSection = RequestSection()
    """Changes to a request's JSON body before it reaches the engine."""
    args: fields.Words = _MODEL.args
    """Arguments for the engine, appended as they are."""
    env: fields.Environment = Field(default_factory=dict)
    """Environment variables for the engine."""


class ModelSection(ModelSettings):
    """One model as it should be served."""

    source: fields.Source
    """A file below `storage.models_path`, an absolute path, or a hub id such as `ORG/NAME` for vLLM and TGI."""
    backends: fields.Names | None = None
    """Engines that may serve it, best first; default: every engine that can read the source."""
    sources: dict[str, fields.Source] = Field(default_factory=dict)
    """Another source for one engine, by the engine's name."""
    aliases: fields.Aliases = _MODEL.aliases
    """Other names under which clients may ask for it."""


class Discovery(Section):
    """Models found on disk that no entry names."""

    enabled: bool = _DISCOVERY.enabled
    """Whether `storage.models_path` and `stores` are searched. Nothing in them is ever changed."""
    serve: bool = _DISCOVERY.serve
    """Whether clients may use what was found; an entry of `models` goes before a found model of the same name or file."""
    stores: fields.Stores = _DISCOVERY.stores
    """More folders to search. `auto` are those of the Hugging Face hub, llama.cpp, Ollama and LM Studio; `[]` is none."""
    defaults: ModelSettings = ModelSettings()
    """How discovered models are run."""


class ConfigFile(Section):
    """What an offloadd daemon serves, and with what."""

    server: Server = Server()
    """The API's own side."""
    storage: Storage = Storage()
    """Folders."""
    budget: BudgetSection = BudgetSection()
    """Memory that may be promised to instances."""
    backends: dict[fields.BackendKey, BackendSection] = Field(default_factory=dict)
    """Engines, by name. The built-in ones exist without being written."""
    models: dict[fields.ModelKey, ModelSection] = Field(default_factory=dict)
    """What is served, by the name that clients ask for."""
    discovery: Discovery = Discovery()
    """Models found on disk that no entry names."""


def _kind_title(kind: str | None) -> str:
    return f'an engine of kind "{kind}"' if kind else "a built-in engine"
