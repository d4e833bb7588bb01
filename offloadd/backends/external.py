"""Engines of `kind: external`: servers that run elsewhere, at a URL. They are never started, only asked whether they are there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from offloadd.backends.base import default_exit
from offloadd.backends.custom import api_of
from offloadd.state.desired import BackendKind, BackendOptions, Engine, ModelSpec
from offloadd.state.ids import BackendName, DeviceKind
from offloadd.state.launch import (
    Endpoint,
    EngineApi,
    ExitCause,
    ExitStatus,
    Health,
    Launch,
    ModelFacts,
    Placement,
    Probe,
    ProbeReply,
    Probes,
    SourceNeed,
    VramEstimate,
)
from offloadd.units import Bytes, Seconds

_PROBE = Probe(path="/v1/models", timeout=Seconds(10))
_PORTS = {"http": 80, "https": 443}


def endpoint_of(engine: Engine) -> Endpoint:
    """Where its URL leads. A URL without a path means the usual one, `/v1`."""
    url = urlsplit(engine.url)
    path = url.path.rstrip("/")
    tls = url.scheme == "https"
    port = url.port or _PORTS[url.scheme]
    return Endpoint(host=url.hostname or "", port=port, tls=tls, api=path or "/v1", key=engine.key)


@dataclass(frozen=True, slots=True)
class External:
    """The adapter of every external engine; `bound` to one of them, it knows its name."""

    engine: Engine = field(default=Engine(name=BackendName("external"), adapter="external", kind=BackendKind.EXTERNAL), hash=False)
    name: str = "external"
    title: str = "an external engine"
    kind: BackendKind = BackendKind.EXTERNAL
    options: type[BackendOptions] = BackendOptions
    default_command: tuple[str, ...] = ()
    preference: int = 9
    reads: tuple[str, ...] = ()
    reads_hub_ids: bool = True
    cancels_only_streams: bool = False
    more_ports: int = 0
    version_argv: tuple[str, ...] = ()
    devices_argv: tuple[str, ...] = ()

    def bound(self, engine: Engine) -> External:
        """The adapter of this one."""
        return External(engine)

    def read_devices(self, text: str) -> frozenset[DeviceKind] | None:
        """It uses none of ours."""
        return frozenset()

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """None."""
        return ()

    def source_need(self, source: str) -> SourceNeed:
        """Nothing of ours."""
        return SourceNeed.NOTHING

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate:
        """Nothing at all, whatever `vram` says for the other engines."""
        return VramEstimate(total=Bytes(0), on_host=Bytes(0), basis="it runs elsewhere")

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """Nothing is started; what stands here tells one setting from another, without saying the key."""
        key = hashlib.sha256(engine.key.encode()).hexdigest()[:16]
        return Launch(argv=("external", engine.url, key, self._named(spec)))

    def probes(self, spec: ModelSpec) -> Probes:
        """What the config names; else its list of models, which costs nobody a token."""
        ready = self.engine.ready
        probe = _PROBE if ready is None else Probe(path=ready.path, timeout=_PROBE.timeout)
        return Probes(readiness=(probe,), liveness=probe)

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """The status that the config names; else any answer but a failure or a wrong key: not every API has a list."""
        if self.engine.ready is not None:
            return Health.READY if reply.status == self.engine.ready.status else Health.SILENT
        if reply.status is None or reply.status >= 500 or reply.status in (401, 403):
            return Health.SILENT
        return Health.READY

    def api(self, spec: ModelSpec) -> EngineApi:
        """What the config says, under the model's name there."""
        return api_of(self.engine, self._named(spec))

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """It has no process that could end."""
        return default_exit(status, log_tail, was_ready=was_ready)

    def _named(self, spec: ModelSpec) -> str:
        """What the model is called there."""
        return spec.sources.get(self.engine.name, spec.name)


BACKEND = External()
