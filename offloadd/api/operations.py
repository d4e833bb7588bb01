"""Every operation of the API: what it needs of its caller, takes and gives. The guard and /openapi.json read this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offloadd.api import shapes
from offloadd.state.access import Scope

Schema = Mapping[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
TEXT = "text/plain"
HTML = "text/html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. `gives` are the media types of a good answer, each with its schema; None for one that is not JSON."""

    method: str
    path: str
    """As the router spells it, without patterns: `/models/{name}`."""
    scope: Scope
    says: str
    tag: str
    takes: Schema | None = None
    """Schema of the JSON body."""
    uploads: bool = False
    """The body is multipart."""
    query: Mapping[str, Schema] | None = None
    gives: Mapping[str, Schema | None] | None = None
    good: Sequence[int] = (200,)
    """Statuses of a good answer."""


def _look(path: str, says: str, gives: Schema, scope: Scope = Scope.READ, tag: str = "status", **more: Any) -> Operation:
    return Operation(method="GET", path=path, scope=scope, says=says, tag=tag, gives={JSON: gives}, **more)


def _steer(path: str, says: str, gives: Schema, **more: Any) -> Operation:
    return Operation(method="POST", path=path, scope=Scope.ADMIN, says=says, tag="control", gives={JSON: gives}, **more)


def _infer(
    path: str, says: str, takes: Schema, tag: str, *, gives: Mapping[str, Schema | None] | None = None, **more: Any
) -> Operation:
    given = {JSON: shapes.OBJECT, EVENTS: None} if gives is None else gives
    return Operation(method="POST", path=path, scope=Scope.INFERENCE, says=says, tag=tag, takes=takes, gives=given, **more)


_STATUS = (
    _look(
        "/health", "Whether all is well, with the problems; 503 when the scheduler does not progress.", shapes.HEALTH, Scope.OPEN
    ),
    _look("/vram/status", "The memory ledger, device by device.", shapes.VRAM),
    _look("/models", "Every model: state, reason, memory, instances.", shapes.MODELS),
    _look("/models/{name}", "One model, by its name or an alias.", shapes.MODEL),
    _look("/backends", "Every engine: version, available or why not, load.", shapes.BACKENDS),
    _look("/backends/{name}", "One engine.", shapes.BACKEND),
    _look("/explain", "What was decided lately, and why.", shapes.OBJECT, query={"request": shapes.TEXT}),
    _look("/explain/{model}", "The same of one model.", shapes.OBJECT),
    _look("/config", "The config in force, secrets hidden, and the last attempt to change it.", shapes.CONFIG, Scope.ADMIN),
    _look("/openapi.json", "This description.", shapes.OBJECT, Scope.OPEN),
    Operation(
        method="GET",
        path="/events",
        scope=Scope.READ,
        says="Events as they happen.",
        tag="status",
        gives={EVENTS: None},
        query={"model": shapes.TEXT},
    ),
    Operation(
        method="GET", path="/metrics", scope=Scope.READ, says="The numbers, for Prometheus.", tag="status", gives={TEXT: None}
    ),
    Operation(
        method="GET",
        path="/logs/{instance}",
        scope=Scope.ADMIN,
        says="What an instance wrote; with follow=1 also what it writes from now on.",
        tag="status",
        gives={TEXT: None},
        query={"follow": shapes.SWITCH, "lines": shapes.COUNT},
    ),
    Operation(method="GET", path="/ui", scope=Scope.OPEN, says="A dashboard page.", tag="status", gives={HTML: None}),
    Operation(method="GET", path="/", scope=Scope.OPEN, says="A word that the server is there.", tag="status", gives={TEXT: None}),
)
_CONTROL = (
    _steer(
        "/reload",
        "Read the config again; 400 with diagnostics when it is refused.",
        shapes.RELOADED,
        query={"wait": shapes.SWITCH},
        good=(200, 202),
    ),
    _steer("/plan", "What a posted config would change.", shapes.OBJECT),
    _steer("/models/{name}/load", "Load a model now.", shapes.OBJECT, query={"wait": shapes.SWITCH}, good=(200, 202)),
    _steer("/models/{name}/unload", "Unload a model now.", shapes.OBJECT, query={"wait": shapes.SWITCH}, good=(200, 202)),
    _steer("/models/pull", "Download a model from the hub, as a job.", shapes.PULL, takes=shapes.PULLED, good=(202,)),
    _look("/pulls", "Downloads that run, wait, or ended lately.", shapes.PULLS, Scope.ADMIN),
    _look("/pulls/{id}", "One download.", shapes.PULL, Scope.ADMIN),
    Operation(
        method="DELETE",
        path="/pulls/{id}",
        scope=Scope.ADMIN,
        says="End a download; what has come is kept for another try.",
        tag="control",
        gives={JSON: shapes.PULL},
        good=(202,),
    ),
    Operation(
        method="GET",
        path="/pulls/{id}/events",
        scope=Scope.ADMIN,
        says="A download's progress, until it has ended.",
        tag="control",
        gives={EVENTS: None},
    ),
    Operation(
        method="POST",
        path="/borrow",
        scope=Scope.ADMIN,
        says="Memory for a program of your own, for as long as the connection stays open.",
        tag="control",
        takes=shapes.BORROW,
        gives={LINES: None},
    ),
)
_OF_SOME = (
    "rerank",
    "audio/speech",
    "audio/transcriptions",
    "audio/translations",
    "images/generations",
    "images/edits",
    "images/variations",
)


def _tgi(path: str) -> tuple[str, str]:
    return path, "/tgi/{model}" + path


_INFERENCE = (
    _infer("/inference", "A prompt or messages in, text out.", shapes.PLAIN, "inference"),
    _infer("/v1/chat/completions", "OpenAI's chat completions.", shapes.CHAT, "openai"),
    _infer("/v1/completions", "OpenAI's completions.", shapes.COMPLETION, "openai"),
    _infer("/v1/embeddings", "OpenAI's embeddings.", shapes.EMBEDDING, "openai", gives={JSON: shapes.OBJECT}),
    _infer(
        "/v1/responses",
        "OpenAI's responses; none is stored.",
        shapes.NAMED,
        "openai",
    ),
    _infer("/v1/responses/input_tokens", "How long a response's input is.", shapes.NAMED, "openai", gives={JSON: shapes.OBJECT}),
    *(_infer(f"/v1/{path}", f"OpenAI's {path}, of engines that have it.", shapes.NAMED, "openai") for path in _OF_SOME),
    _infer("/v1/messages", "Anthropic's messages.", shapes.MESSAGES, "anthropic"),
    _infer("/v1/messages/count_tokens", "Anthropic's token count.", shapes.MESSAGES, "anthropic", gives={JSON: shapes.OBJECT}),
    _infer("/api/chat", "Ollama's chat.", shapes.OLLAMA_CHAT, "ollama", gives={LINES: None, JSON: shapes.OBJECT}),
    _infer("/api/generate", "Ollama's generate.", shapes.OLLAMA_GENERATE, "ollama", gives={LINES: None, JSON: shapes.OBJECT}),
    _infer("/api/embed", "Ollama's embed.", shapes.OLLAMA_EMBED, "ollama", gives={JSON: shapes.OBJECT}),
    _infer("/api/embeddings", "Ollama's older embeddings.", shapes.OLLAMA_EMBEDDING, "ollama", gives={JSON: shapes.OBJECT}),
    Operation(
        method="POST",
        path="/api/pull",
        scope=Scope.ADMIN,
        says="Ollama's pull: a download from the hub, with its progress.",
        tag="ollama",
        takes=shapes.OLLAMA_PULL,
        gives={LINES: None, JSON: shapes.OBJECT},
    ),
    _infer("/api/show", "Ollama's description of a model.", shapes.NAMED, "ollama", gives={JSON: shapes.OBJECT}),
    *(
        _infer(path, "TGI's generate, whole or as a stream.", shapes.TGI, "tgi", gives={JSON: shapes.TGI_ANSWERS, EVENTS: None})
        for path in ("/", "/tgi/{model}")
    ),
    *(_infer(path, "TGI's generate.", shapes.TGI, "tgi", gives={JSON: shapes.OBJECT}) for path in _tgi("/generate")),
    *(_infer(path, "TGI's stream of tokens.", shapes.TGI, "tgi", gives={EVENTS: None}) for path in _tgi("/generate_stream")),
    *(_look(path, "A model's limits, in TGI's words.", shapes.OBJECT, Scope.INFERENCE, "tgi") for path in _tgi("/info")),
    _look("/v1/models", "OpenAI's list of models.", shapes.OPENAI_MODELS, Scope.INFERENCE),
    _look("/v1/models/{name}", "One entry of it.", shapes.OPENAI_MODEL, Scope.INFERENCE),
    _look("/api/tags", "Ollama's list of models.", shapes.OBJECT, Scope.INFERENCE, "ollama"),
    _look("/api/ps", "Ollama's list of loaded models.", shapes.OBJECT, Scope.INFERENCE, "ollama"),
    _look("/api/version", "The version of Ollama's API that this follows.", shapes.OBJECT, Scope.OPEN, "ollama"),
)
OPERATIONS: Mapping[tuple[str, str], Operation] = {(each.method, each.path): each for each in (*_STATUS, *_CONTROL, *_INFERENCE)}
