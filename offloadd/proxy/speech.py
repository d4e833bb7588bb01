"""What a model's engines speak: whether a path can be served at all, and under which name an engine knows the model."""

from __future__ import annotations

from collections.abc import Callable

from offloadd.errors import RequestError
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName
from offloadd.state.launch import EngineApi

ApiOf = Callable[[ModelSpec, BackendName], EngineApi]

_CAPABILITIES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "the responses API",
    "/v1/rerank": "reranking",
    "/v1/messages/count_tokens": "counting tokens",
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation of speech",
    "/v1/audio/speech": "speech",
    "/v1/images/generations": "making images",
    "/v1/images/edits": "editing images",
    "/v1/images/variations": "varying images",
}


def check_spoken(spec: ModelSpec, api_of: ApiOf, *paths: str) -> None:
    """RequestError 400 unless one of the model's engines answers one of the paths: before it is loaded for nothing."""
    apis: list[EngineApi] = []
    for name in spec.backends:
        apis.append(api := api_of(spec, name))
        if not api.paths.isdisjoint(paths):
            return
    raise cannot(spec, apis, paths[0])


def speaks(spec: ModelSpec, api: EngineApi, *paths: str) -> str:
    """The first of the paths that the engine answers; RequestError 400 when it answers none."""
    for path in paths:
        if path in api.paths:
            return path
    raise cannot(spec, [api], paths[0])


def cannot(spec: ModelSpec, apis: list[EngineApi], path: str) -> RequestError:
    """The refusal, which names what is missing and, where there is something to do about it, what."""
    what = _CAPABILITIES.get(path, path)
    hints = sorted({api.hints[path] for api in apis if path in api.hints})
    how = f"; in the config: {' or '.join(hints)}" if hints else ""
    engines = ", ".join(spec.backends)
    message = f"{spec.name} does not offer {what}: none of its engines ({engines}) serves {path}{how}"
    return RequestError(400, "unsupported_capability", message, param="model")


def name_for(spec: ModelSpec, api: EngineApi) -> str:
    """The name under which this engine knows the model."""
    return api.model or spec.name
