"""What passes between the planner, an engine's adapter and the process runner."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from offloadd.state.ids import BackendName, DeviceId, DeviceKind, ModelName
from offloadd.state.shape import ModelShape
from offloadd.state.wire import Wire
from offloadd.units import Bytes, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an instance listens: loopback, or wherever an external engine is."""

    host: str
    port: int
    more: tuple[int, ...] = ()
    """Further ports of its own, as many as its adapter asks for."""
    tls: bool = False
    api: str = "/v1"
    """What stands for `/v1` in the paths of its OpenAI API."""
    key: str = field(default="", repr=False)
    """Who asks there shows it: random for each launch, so that nobody on the machine goes past offloadd; an external engine's own;
    empty where the engine knows no keys."""
    folder: str = ""
    """The launch's own, for its sockets and temporary files, removed with it: short enough for names of 48 bytes below it. Empty
    where there is none."""

    @property
    def url(self) -> str:
        """`http://host:port`, without a trailing slash."""
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    @property
    def authority(self) -> str:
        """`host:port`, as a URL and the Host header write it; without the port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.tls and self.port == 443 else f"{host}:{self.port}"

    def at(self, path: str) -> str:
        """Where a path of ours is there: `/v1/…` within its API, any other beside it."""
        if path == "/v1" or path.startswith(("/v1/", "/v1?")):
            return self.api + path.removeprefix("/v1")
        return self.api.removesuffix("/v1") + path

    @property
    def headers(self) -> dict[str, str]:
        """What shows the key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The memory given to an instance, by device.

    `gpus` hold its layers, in the order in which the engine is to see them; none means that it runs on the CPU. `split` says how
    many layers each of them holds, the output layer counted; empty when they hold all of them and no division is asked for.
    """

    reserved: Mapping[DeviceId, Bytes]
    gpus: tuple[DeviceId, ...] = ()
    split: tuple[int, ...] = ()
    whole: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """All memory of each of `gpus`, for engines that are told their part as a share of it."""
    used: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """What was used of it when this was decided."""
    elastic: bool = False
    """Whether the engine sizes itself by what it finds on its GPUs: nothing else may load there meanwhile."""
    asleep: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """What it is expected to hold of each of `gpus` still when it sleeps; empty when it cannot sleep."""

    @property
    def total(self) -> Bytes:
        """Bytes over all devices."""
        return Bytes(sum(self.reserved.values()))

    @property
    def freed_asleep(self) -> Mapping[DeviceId, Bytes]:
        """What it gives back when it falls asleep."""
        return {gpu: Bytes(max(0, self.reserved.get(gpu, 0) - size)) for gpu, size in self.asleep.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A program to run: its argument vector, and the variables added to a clean environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One HTTP request that tells something about an instance: a GET, or with a `body` a POST of JSON."""

    path: str
    timeout: Seconds = Seconds(2)
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """`readiness`: all must read READY once, in order, before requests are sent.

    `liveness`: must pass through the engine's own working loop, so that an answer means work can be done.
    """

    readiness: tuple[Probe, ...]
    liveness: Probe
    canary: Probe | None = None
    """The smallest piece of real work, for an instance that nobody uses; None where there is none that costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Naps:
    """How an engine is put to sleep and woken: calls in order, each of which must answer 200."""

    level: int
    sleep: tuple[Probe, ...]
    wake: tuple[Probe, ...]
    asks: Probe
    """Whether it sleeps; the question passes through its working loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReply:
    """What a probe brought back; `status` is None when nothing answered, and `error` says why."""

    status: int | None
    body: bytes = b""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine says that it is."""

    running: int
    waiting: int = 0
    """Requests that it has taken and not begun."""
    cache: float | None = None
    """Share of its KV cache in use, 0..1; None where it does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineApi:
    """What the HTTP server of one model's engine speaks, so that a client's dialect is passed on or translated."""

    paths: frozenset[str] = frozenset({"/v1/chat/completions", "/v1/completions"})
    """POST paths that it answers for this model; any other is translated, or refused by name."""
    hints: Mapping[str, str] = field(default_factory=dict)
    """How to have it answer a path that it could: what to write in the config."""
    model: str = ""
    """The name that requests must give it; empty when it does not look at it."""
    images: bool = False
    """Whether it sees pictures."""
    closed: frozenset[str] = frozenset()
    """First segments of paths that no client may ask it for, since they are for whoever runs it."""
    exact: bool = True
    """Whether its OpenAI streams may reach clients as they are: names, ids and endings are OpenAI's, for certain."""
    lasting: bool = False
    """Whether a connection is good for another request after a stream, for certain."""
    spare: bool = False
    """Whether a connection to it may wait unused for the next stream, for certain: others are served meanwhile."""
    wire: Wire | None = None
    """What it speaks in place of OpenAI's JSON; the paths are then those that requests to it are translated from."""


class Health(StrEnum):
    """An adapter's reading of a probe's reply."""

    LOADING = "loading"
    READY = "ready"
    SILENT = "silent"
    """Nothing was learned: no answer, or one that says nothing about life or death."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a process ended; both None when it was not our child and the kernel does not tell."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "exit code unknown" if self.code is None else f"exit code {self.code}"


class ExitKind(StrEnum):
    """Why an instance ended, as far as its exit status and its log tell."""

    STOPPED = "stopped"
    CRASHED = "crashed"
    KILLED = "killed"
    BAD_MODEL = "bad-model"
    BAD_OPTION = "bad-option"
    PORT_TAKEN = "port-taken"
    OUT_OF_MEMORY = "out-of-memory"
    """A GPU had no more."""
    OUT_OF_HOST_MEMORY = "out-of-host-memory"
    """RAM had no more, by the engine's word or the kernel's."""
    NOT_STARTED = "not-started"
    START_TIMEOUT = "start-timeout"
    HUNG = "hung"
    SLEEPLESS = "sleepless"
    """Told to sleep, it did not give its memory back, and was stopped in place of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCause:
    """An explained exit. `permanent` means that the same start would fail the same way."""

    kind: ExitKind
    message: str
    hint: str = ""
    permanent: bool = False


class SourceNeed(StrEnum):
    """What an engine must find of a model's source before it can be started."""

    DISK = "disk"
    """A file or folder."""
    DISK_OR_HUB = "disk-or-hub"
    """The same, or else a hub id, which it fetches by itself."""
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of the files that an engine would load, read from disk.

    `identity` changes when the content may have changed, also when the file was only moved elsewhere; `content` is the same for the
    same content, wherever it lies. `problem` says why it cannot be loaded, and `hint` what to do.
    """

    path: str = ""
    """As the engine is given it: a file, a folder or a hub id."""
    read_from: str = ""
    """Where its headers lie, when that is not `path`."""
    size: Bytes | None = None
    identity: str = ""
    content: str = ""
    """Empty when it was not looked into, or could not be."""
    shape: ModelShape | None = None
    """What the file's header says; None when it was not read or could not be."""
    companions: Mapping[str, ModelFacts] = field(default_factory=dict)
    """Other files that the engine loads beside it, projectors and adapters, by the name that the config gives them."""
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VramEstimate:
    """Predicted memory of one instance, in bytes, in the parts that placement can move.

    `total` is what one device takes when all of it lies there, RAM included. An engine that can be divided says `layers` and
    `fixed`, and then `total` is their sum.
    """

    total: Bytes
    basis: str
    """How it came about, as an operator would say it: `file 96.6 MiB + margin 512 MiB`."""
    layers: tuple[Bytes, ...] = ()
    """Weights and cache of each layer in order, the output layer last; empty when it cannot be divided."""
    fixed: Bytes = Bytes(0)
    """On every device that takes part: work buffers and the driver's context."""
    host: Bytes = Bytes(0)
    """RAM beside a placement on GPUs."""
    on_host: Bytes | None = None
    """RAM when all of it runs on the CPU; None means `total`."""
    even: Mapping[int, Bytes] = field(default_factory=dict)
    """What each GPU takes when all of it is divided evenly over so many; empty when it cannot be."""
    elastic: bool = False
    """Whether it takes what it is promised, whatever that is: then nothing is learned from what it took."""
    asleep: Bytes | None = None
    """What it still holds of each of its GPUs when it sleeps; None when it cannot sleep."""
    learned: bool = False
    """Whether `total` was measured on earlier launches rather than worked out."""
    estimated: Bytes | None = None
    """What was worked out, where `total` was learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What earlier launches of one kind really took at their peak, and how long they loaded."""

    model: ModelName
    backend: BackendName
    peak: Bytes
    load_seconds: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One engine's offer to serve one model: everything the planner needs to decide about it.

    `fingerprint` is a hash over all that reaches the engine's command line and environment, save the endpoint; it is empty when
    the facts are not known. A `problem` rules the candidate out for now.
    """

    backend: BackendName
    facts: ModelFacts
    fingerprint: str = ""
    estimate: VramEstimate | None = None
    gpus: frozenset[DeviceKind] | None = None
    """Kinds of GPUs that the engine can use; None when that is not known, and then any."""
    footprint_key: str = ""
    """Under which the registry keeps what such a launch was measured to take."""
    former_key: str = ""
    """Under which an older offloadd kept it, and where it was found; empty when it was not."""
    problem: str = ""
    hint: str = ""
