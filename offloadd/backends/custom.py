"""Engines of `kind: custom`: any program with an HTTP API, started as the config says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offloadd.backends.base import default_exit, visible
from offloadd.backends.words import fill, mentions
from offloadd.state.desired import BackendKind, BackendOptions, Engine, ModelSpec, ReadyRule
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
from offloadd.units import Bytes, Seconds, format_bytes

_MARGIN = Bytes(512 * 2**20)
_MARGIN_SHARE = 0.2
_FORMAT_OF = "backends.{}.inference.format"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ANY_PATH = frozenset(
    {
        CHAT,
        COMPLETIONS,
        "/v1/embeddings",
        "/v1/responses",
        "/v1/rerank",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/audio/speech",
        "/v1/images/generations",
        "/v1/images/edits",
    }
)
"""What an OpenAI API may have. What it has is for the engine to say."""


def api_of(engine: Engine, model: str) -> EngineApi:
    """OpenAI's, as far as it goes, or what can be said in the JSON that the config declares; under this name of the model."""
    wire = engine.wire
    if wire is None:
        return EngineApi(paths=ANY_PATH, model=model, exact=False)
    spoken = {CHAT: wire.chats, COMPLETIONS: wire.prompt is not None}
    hints = {CHAT: f"{_FORMAT_OF.format(engine.name)}.messages or .turns", COMPLETIONS: f"{_FORMAT_OF.format(engine.name)}.prompt"}
    paths = frozenset(path for path, can in spoken.items() if can)
    return EngineApi(paths=paths, hints=hints, model=model, exact=False, wire=wire)


@dataclass(frozen=True, slots=True)
class Custom:
    """The adapter of every custom engine; `bound` to one of them, it knows what the config says of it."""

    engine: Engine = field(default=Engine(name=BackendName("custom"), adapter="custom", kind=BackendKind.CUSTOM), hash=False)
    name: str = "custom"
    title: str = "a custom engine"
    kind: BackendKind = BackendKind.CUSTOM
    options: type[BackendOptions] = BackendOptions
    default_command: tuple[str, ...] = ()
    preference: int = 9
    reads: tuple[str, ...] = ()
    reads_hub_ids: bool = True
    cancels_only_streams: bool = False
    more_ports: int = 0
    version_argv: tuple[str, ...] = ()
    devices_argv: tuple[str, ...] = ()

    def bound(self, engine: Engine) -> Custom:
        """The adapter of this one."""
        return Custom(engine)

    def read_devices(self, text: str) -> frozenset[DeviceKind] | None:
        """Nobody knows."""
        return None

    def companions(self, spec: ModelSpec) -> tuple[str, ...]:
        """None."""
        return ()

    def source_need(self, source: str) -> SourceNeed:
        """Nothing, unless its command asks for the source."""
        asks = mentions((*self.engine.command, *self.engine.args), "source")
        return SourceNeed.DISK_OR_HUB if asks else SourceNeed.NOTHING

    def estimate(self, spec: ModelSpec, facts: ModelFacts) -> VramEstimate | None:
        """`vram` in the config, else the size of what it loads with a margin; None when neither is there."""
        if spec.vram != "auto":
            return VramEstimate(total=spec.vram, basis=f"vram: {format_bytes(spec.vram)} in the config")
        if not facts.size:
            return None
        margin = _MARGIN + int(facts.size * _MARGIN_SHARE)
        basis = f"file {format_bytes(facts.size)} + margin {format_bytes(margin)}, as for any custom engine"
        return VramEstimate(total=Bytes(facts.size + margin), basis=basis)

    def launch(self, engine: Engine, spec: ModelSpec, facts: ModelFacts, placement: Placement, endpoint: Endpoint) -> Launch:
        """The command with its words filled in."""
        argv = fill((*engine.command, *engine.args, *spec.args), spec, facts, endpoint)
        env = {name: fill((value,), spec, facts, endpoint)[0] for name, value in {**engine.env, **spec.env}.items()}
        return Launch(argv=argv, env={**visible(placement), **env})

    def probes(self, spec: ModelSpec) -> Probes:
        """The one that the config names."""
        probe = Probe(path=self._ready.path, timeout=Seconds(5))
        return Probes(readiness=(probe,), liveness=probe)

    def read_probe(self, spec: ModelSpec, path: str, reply: ProbeReply) -> Health:
        """The status that the config names is ready, 503 is loading."""
        if reply.status == self._ready.status:
            return Health.READY
        return Health.LOADING if reply.status == 503 else Health.SILENT

    def api(self, spec: ModelSpec) -> EngineApi:
        """What the config says; the model is named as its command was told."""
        return api_of(self.engine, spec.sources.get(self.engine.name, spec.name))

    def explain_exit(self, status: ExitStatus, log_tail: Sequence[str], *, was_ready: bool) -> ExitCause:
        """Its last line."""
        return default_exit(status, log_tail, was_ready=was_ready)

    @property
    def _ready(self) -> ReadyRule:
        return self.engine.ready or ReadyRule()


BACKEND = Custom()
