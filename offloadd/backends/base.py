"""What every engine's adapter answers, and what adapters share. An adapter is a pure translator."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Protocol, Self, runtime_checkable

from offloadd.state.desired import BackendKind, BackendOptions, Engine, ModelSpec
from offloadd.state.found import Found
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind
from offloadd.state.launch import (
    Endpoint,
    EngineApi,
    EngineLoad,
    ExitCause,
    ExitKind,
    ExitStatus,
    Health,
    Launch,
    ModelFacts,
    Naps,
    Placement,
    Probe,
    ProbeReply,
    Probes,
    SourceNeed,
    VramEstimate,
)
from offloadd.units import Bytes


class Backend(Protocol):
    """One engine. `options` are the typed fields that it offers under a model."""

    @property
    def name(self) -> str:
        """What configs call it."""
        ...

    @property
    def title(self) -> str:
        """What people call it."""
        ...

    @property
    def kind(self) -> BackendKind:
        """Whether it is an engine of its own, or stands for all that a config describes."""
        ...

    @property
    def options(self) -> type[BackendOptions]:
        """Its typed options under a model."""
        ...

    @property
    def default_command(self) -> tuple[str, ...]:
        """How it is started where the config does not say."""
        ...

    @property
    def preference(self) -> int:
        """Breaks ties between engines: the lowest wins."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """File name endings that it can load; empty when it takes whatever no other engine claims."""
        ...

    @property
    def reads_hub_ids(self) -> bool:
        """Whether it can load `ORG/NAME` from a hub by itself."""
        ...

    @property
    def cancels_only_streams(self) -> bool:
        """True when a client that leaves ends a streaming request only, and any other runs to its end."""
        ...

    @property
    def more_ports(self) -> int:
        """How many ports each instance needs beside the one that it serves on."""
        ...

    @property
    def version_argv(self) -> tuple[str, ...]:
        """Arguments that make the program print its version and exit; empty when it cannot in reasonable time."""
        ...

    @property
    def devices_argv(self) -> tuple[str, ...]:
        """Arguments that make it list the GPUs that it can use and exit; empty when it cannot."""
        ...

    def bound(self, engine: Engine) -> Backend:
        """The adapter for one engine of the config: what a custom one does depends on what the config says of it."""
        ...

    def source_need(self, source: str) -> SourceNeed:
        """What must be found of this source before it can start."""
        ...

    def read_devices(self, text: str) -> frozenset[DeviceKind] | None:
        """Kinds of GPUs in that list; None when the text is no such list."""
        ...

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """Other files that it loads beside the model, as the config names them; they come in `ModelFacts.companions`."""
        ...

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
        """Predict the memory of one instance; None when nothing is known to go by."""
        ...

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """The command line and environment of one instance."""
        ...

    def probes(self, spec: ModelSpec) -> Probes:
        """How to ask whether it is ready and alive."""
        ...

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """What the reply to the probe of `path` means."""
        ...

    def api(self, spec: ModelSpec) -> EngineApi:
        """Which of the paths of its HTTP API work for this model, and how it wants to be asked."""
        ...

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Why it ended on its own, from its exit status and the last lines of its log."""
        ...


@runtime_checkable
class SuitsFiles(Protocol):
    """An adapter that knows what a file on disk asks for: what an operator would have to write for it."""

    def suit(self, options: BackendOptions | None, found: Found) -> BackendOptions:
        """The options with what the found model needs, such as its projector."""
        ...


@runtime_checkable
class TellsLoad(Protocol):
    """An adapter of an engine that says how busy it is."""

    def load_probe(self, spec: ModelSpec) -> Probe | None:
        """A cheap question that it answers while it works; None where it cannot be asked."""
        ...

    def read_load(self, spec: ModelSpec, reply: ProbeReply) -> EngineLoad | None:
        """What the answer says; None when it does not tell."""
        ...


@runtime_checkable
class CanSleep(Protocol):
    """An adapter of an engine that can give its GPU memory back and live on."""

    def naps(self, spec: ModelSpec) -> Naps | None:
        """How it is put to sleep and woken; None where the model's options do not ask for it."""
        ...

    def read_nap(self, reply: ProbeReply) -> bool | None:
        """Whether it sleeps, by the reply to `Naps.asks`; None when that does not tell."""
        ...


class HubEngine:
    """What engines have in common that load folders and hub ids, tell models apart by name, and stop when a client leaves.

    A new adapter begins here and says what is its own: `name`, `title`, `default_command`, `preference`, `estimate`, `launch`
    and `probes`, and whatever of the following does not fit.
    """

    name = ""
    title = ""
    kind = BackendKind.BUILTIN
    options: type[BackendOptions] = BackendOptions
    default_command: tuple[str, ...] = ()
    preference = 9
    reads: tuple[str, ...] = ()
    reads_hub_ids = True
    cancels_only_streams = False
    more_ports = 0
    version_argv: tuple[str, ...] = ()
    devices_argv: tuple[str, ...] = ()

    def bound(self, engine: Engine) -> Self:
        """The same for every engine."""
        return self

    def read_devices(self, text: str) -> frozenset[DeviceKind] | None:
        """It lists none."""
        return None

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """None that it does not find by itself."""
        return ()

    def source_need(self, source: str) -> SourceNeed:
        """A folder, or else a hub id."""
        return SourceNeed.DISK_OR_HUB

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """200 is ready, 503 is loading; a server that lists another model is not ours."""
        if reply.status == 503:
            return Health.LOADING
        if reply.status == 200 and path == "/v1/models":
            return Health.READY if spec.name in listed(reply.body) else Health.SILENT
        return Health.READY if reply.status == 200 else Health.SILENT

    def api(self, spec: ModelSpec) -> EngineApi:
        """OpenAI's texts, under the model's name."""
        return EngineApi(model=spec.name, exact=False)

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Its last line."""
        return default_exit(status, log_tail, was_ready=was_ready)


NOWHERE = Placement(reserved={})
_A_GPU = DeviceId(LOCAL, "gpu")
SOMEWHERE = Placement(reserved={_A_GPU: Bytes(2**33)}, gpus=(_A_GPU,), whole={_A_GPU: Bytes(2**34)}, used={_A_GPU: Bytes(0)})
"""All of it on one GPU: what is said there only must show in a fingerprint, too."""
NO_ENDPOINT = Endpoint(host="127.0.0.1", port=0)


def backend_of(backends: Mapping[str, Backend], engine: Engine | None) -> Backend | None:
    """The adapter that speaks for one engine of the config; None when this version has none."""
    found = backends.get(engine.adapter) if engine else None
    return found.bound(engine) if found and engine else None


def fingerprint(backend: Backend, engine: Engine, spec: ModelSpec, facts: ModelFacts) -> str:
    """Hash all that reaches the engine, with a neutral endpoint: a change means that a running instance is stale.

    It is taken over the launch itself, so no list of launch-relevant fields has to be kept up beside the adapters; only what
    placement is made from is added, since a launch for nowhere does not show it.
    """
    endpoint = replace(NO_ENDPOINT, more=(0,) * backend.more_ports)
    launches = [backend.launch(engine, spec, facts, placement, endpoint) for placement in (NOWHERE, SOMEWHERE)]
    where = (spec.devices, spec.gpu_layers, spec.partial, spec.vram) if backend.kind is not BackendKind.EXTERNAL else ()
    # How deep it sleeps says how much RAM is kept for its weights, and does not show in the launch.
    naps = backend.naps(spec) if isinstance(backend, CanSleep) else None
    deep = [naps.level] if naps else []
    who = [engine.user, engine.group] if engine.user else []
    text = json.dumps([engine.name, *([launch.argv, sorted(launch.env.items())] for launch in launches), where, *deep, *who])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def visible(placement: Placement) -> dict[str, str]:
    """Let it see its own GPUs and no others. By UUID, which means nothing to the other vendor's driver, and so hides its cards."""
    names = ",".join(gpu.name for gpu in placement.gpus)
    return {"CUDA_VISIBLE_DEVICES": names, "ROCR_VISIBLE_DEVICES": names}


_CONTAINERS = frozenset(
    {"apptainer", "bwrap", "crictl", "ctr", "distrobox", "docker", "enroot", "lxc", "nerdctl", "podman", "singularity"}
)
"""Programs that run others among files of their own."""


def own_folder(engine: Engine, endpoint: Endpoint) -> str:
    """The launch's own folder where the engine can see it; empty where there is none, and in a container, which has its own."""
    contained = any(PurePath(word).name in _CONTAINERS for word in engine.command)
    return "" if contained else endpoint.folder


def read_json(body: bytes) -> Any:
    """An engine's JSON; ValueError when it is none, or too deep to be looked into."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None


def listed(body: bytes) -> set[str]:
    """Names in an answer of `/v1/models`; none when it is no such answer."""
    try:
        return {str(entry["id"]) for entry in read_json(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


@dataclass(frozen=True, slots=True)
class ExitPattern:
    """A line that an engine writes before it dies, and what it means.

    `message` may name groups of `pattern`; the last matching line of the log counts.
    """

    pattern: re.Pattern[str]
    kind: ExitKind
    message: str
    hint: str = ""
    permanent: bool = False


def match_exit(patterns: Sequence[ExitPattern], log_tail: Sequence[str]) -> ExitCause | None:
    """The first pattern, in order of `patterns`, that any line of the log matches."""
    for entry in patterns:
        for line in reversed(log_tail):
            found = entry.pattern.search(line)
            if found:
                text = _filled(entry.message, found)
                return ExitCause(kind=entry.kind, message=text, hint=_filled(entry.hint, found), permanent=entry.permanent)
    return None


def _filled(text: str, found: re.Match[str]) -> str:
    return text.format(**{name: value or "" for name, value in found.groupdict().items()}) if "{" in text else text


def default_exit(status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
    """What can be said when no line of the log explains the end."""
    moment = "while serving" if was_ready else "before it was ready"
    last = next((line.strip() for line in reversed(log_tail) if line.strip()), "")
    said = f"; its last line: {last}" if last else "; it wrote nothing"
    if status.signal == 9:
        return ExitCause(
            kind=ExitKind.KILLED,
            message=f"killed by SIGKILL {moment}{said}",
            hint="someone sent kill -9, or the kernel ran out of memory: see dmesg",
        )
    kind = ExitKind.KILLED if status.signal in (1, 2, 3, 15) else ExitKind.CRASHED
    return ExitCause(kind=kind, message=f"{status} {moment}{said}", hint="its log has more")
