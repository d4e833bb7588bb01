"""From a request's body to the model that it means. Only what routing needs is decoded."""

from __future__ import annotations

import difflib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import unquote

import msgspec
from aiohttp import web
from yarl import URL

from offloadd.errors import RequestError
from offloadd.proxy import affinity
from offloadd.state.desired import DesiredState, JsonValue, ModelSpec, RequestRules
from offloadd.state.launch import EngineApi
from offloadd.units import Seconds

T = TypeVar("T")
_TARGET = re.compile(r"[\x21-\x7e]+")


class Head(msgspec.Struct):
    """The fields of a body that decide where it goes."""

    model: str | None = None
    stream: bool | None = None
    backend: str | None = None
    n: int | None = None
    """How many answers are wanted at once."""
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    prompt_cache_key: msgspec.Raw = msgspec.Raw()

    def conversation(self, spec: ModelSpec) -> int | None:
        """What marks its conversation, where there may be more than one instance to choose from."""
        if spec.replicas.max == 1 and len(spec.backends) == 1:
            return None
        return affinity.conversation(self.messages, self.prompt, self.prompt_cache_key)


_HEAD = msgspec.json.Decoder(Head)


@dataclass(frozen=True, slots=True)
class Names:
    """Which model every name and alias means, for one config."""

    models: Mapping[str, ModelSpec]
    default: ModelSpec | None

    @classmethod
    def of(cls, desired: DesiredState) -> Names:
        """A request without a model means the only one there is, if there is only one."""
        table: dict[str, ModelSpec] = {}
        for spec in desired.models.values():
            table.update(dict.fromkeys((spec.name, *spec.aliases), spec))
        only = next(iter(desired.models.values())) if len(desired.models) == 1 else None
        return cls(table, only)

    def find(self, name: str | None) -> ModelSpec:
        """The model called `name`; RequestError 404 with near names, or 400 when no name was given and several models are."""
        if name is None:
            if self.default is None:
                raise RequestError(400, "model_required", "the request names no model; GET /v1/models lists them", param="model")
            return self.default
        spec = self.models.get(name)
        if spec is None:
            raise RequestError(404, "model_not_found", self._unknown(name), param="model")
        return spec

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.models, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "GET /v1/models lists those that are"
        return f'no model is called "{name[:128]}"; {hint}'


def read_head(body: bytes) -> Head:
    """Decode the routing fields; RequestError 400 says what is wrong with the body."""
    try:
        return _HEAD.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode(body, Head)  # which says it


def read_object(body: bytes) -> dict[str, JsonValue]:
    """Decode a whole body; RequestError 400 as from `read_head`, which does not look into the fields that it skips."""
    return cast(dict[str, JsonValue], _decode(body, dict))


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise RequestError(400, "invalid_body", f"the request's body is not as expected: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"the request's body is not JSON: {error}") from None


def apply_rules(rules: RequestRules, body: bytes) -> bytes:
    """The body with the model's `request` rules applied; the same bytes when there are none."""
    if not rules:
        return body
    fields = read_object(body)
    for name in rules.remove:
        fields.pop(name, None)
    return msgspec.json.encode({**rules.default, **fields, **rules.set})


def upstream_target(url: URL) -> str:
    """What follows the model's name in `/upstream/{model}/{path}`, with its query, as the client wrote it."""
    query = f"?{url.raw_query_string}" if url.raw_query_string else ""
    target = "/" + url.raw_path.split("/", 3)[3] + query
    if not _TARGET.fullmatch(target):
        raise RequestError(400, "bad_path", "the path holds characters that belong there only in their encoded form")
    return target


def check_open(target: str, api: EngineApi) -> None:
    """RequestError 403 for a path that the engine has for whoever runs it, however it is written."""
    first = unquote(target.partition("?")[0]).strip("/").partition("/")[0]
    if first in api.closed:
        raise RequestError(403, "path_not_allowed", f"/{first} is for offloadd only: it changes how the server runs")


async def bounded_body(request: web.Request, limit: int) -> AsyncIterator[bytes]:
    """The request's body as it comes; RequestError 413 when it turns out to be larger than allowed."""
    size = 0
    async for piece in request.content.iter_any():
        size += len(piece)
        if size > limit:
            raise RequestError(413, "body_too_large", f"the body is larger than {limit} bytes")
        yield piece


def check_granted(granted: str, asked: str | None) -> None:
    """The engine that serves the model now must be the one that the request names, if it names one."""
    if asked is not None and asked != granted:
        message = f"the model runs on {granted} now, and the request asks for {asked[:64]}"
        raise RequestError(503, "backend_not_running", message, retry_after=Seconds(5), param="backend")


def check_backend(spec: ModelSpec, name: str | None) -> None:
    """A request may name an engine, which must be one of the model's."""
    if name is not None and name not in spec.backends:
        known = ", ".join(spec.backends)
        raise RequestError(
            400, "backend_not_configured", f"{spec.name} is not served by {name[:64]}; it is by: {known}", param="backend"
        )
