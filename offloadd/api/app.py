"""The aiohttp application: routes, and the middleware that every request passes."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import re
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from offloadd.api import listing, views
from offloadd.api.caller import caller, forget, identify
from offloadd.api.dashboard import dashboard_route
from offloadd.api.express import ADMITTED
from offloadd.api.guard import check_host, check_site, cors_headers, preflight
from offloadd.api.limits import SMALL, Bodies, KeyMeter
from offloadd.api.metrics import exposition
from offloadd.api.openapi import description
from offloadd.api.patience import Patience
from offloadd.api.picture import Control, Picture
from offloadd.api.scopes import check_query, is_passed_on, scope_of
from offloadd.errors import RequestError
from offloadd.events import EventKind, about
from offloadd.state.access import ANYBODY, Access, Caller, Scope
from offloadd.state.desired import ModelSpec, ServerSpec
from offloadd.state.ids import ModelName

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_NAME = r"(?!.+/(?:un)?load$).+"
"""A model's name in a path. One that ends like an action on a model is told from that by writing its slash as %2F."""
_ID_KEY: web.RequestKey[str] = web.RequestKey("request_id", str)
_present_id: ContextVar[str] = ContextVar("request_id", default="")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Shape = Callable[[str, RequestError], tuple[int, dict[str, Any]]]
Ended = Callable[[web.Request, str, int | None, RequestError | None], None]
"""Told of every request once, at its end: its id, the status of its answer (None when its client left), and why it was refused."""
Begun = Callable[[web.Request, RequestError], web.StreamResponse | None]
"""Tells an error within an answer that has begun, where one has."""


def _openai_shape(_: str, error: RequestError) -> tuple[int, dict[str, Any]]:
    return error.status, error.body


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Who may come in: by the config in force, and by what each key has used."""

    access: Callable[[], Access]
    allowed_hosts: Callable[[], Collection[str]]
    meter: KeyMeter
    patience: Patience
    max_body: int = ServerSpec().max_body
    """Bytes of a request's body; more are refused."""
    bodies: Bodies = field(default_factory=Bodies)
    settle: Callable[[], None] = lambda: None
    """Called ahead of whatever may want to know how earlier requests ended."""


def build_app(
    control: Control,
    routes: Iterable[web.RouteDef],
    find: Callable[[str], ModelSpec],
    door: Door,
    ended: Ended = lambda *_: None,
    shape: Shape = _openai_shape,
    begun: Begun = lambda *_: None,
) -> web.Application:
    """The whole API: the control plane's own routes and those of the data plane.

    `find` resolves a model's name or alias; `ended` is told of every request; `shape` says a refusal as the clients of its path
    expect it, `begun` within an answer that has begun.
    """
    app = web.Application(client_max_size=door.max_body, middlewares=[_middleware(door, ended, shape, begun)])

    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(answer_headers(request, door))

    async def expect(request: web.Request) -> web.StreamResponse | None:
        """Say to a client that asks first whether its body is wanted; one that is too large is not."""
        if request.headers.get("Expect", "").lower() != "100-continue":
            raise web.HTTPExpectationFailed(text="only 100-continue can be expected")
        try:
            _check_length(request)
        except web.HTTPRequestEntityTooLarge as error:
            status, body = shape(request.path, _foreign(request, error))
            response = web.json_response(body, status=status)
            response.force_close()
            return response
        if request.version >= (1, 1):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        return None

    app.on_response_prepare.append(finish)
    app.add_routes(_control_routes(control, find))
    app.add_routes(web.route(one.method, one.path, one.handler, **{"expect_handler": expect, **one.kwargs}) for one in routes)
    return app


def answer_headers(request: web.Request, door: Door) -> dict[str, str]:
    """What every answer bears, whoever writes it; some are given before the middleware has named the request."""
    try:
        number = request[_ID_KEY]
    except KeyError:
        number = request[_ID_KEY] = new_id()
    origins = door.access().cors_origins
    return {"X-Request-Id": number, **cors_headers(request, origins)} if origins else {"X-Request-Id": number}


def new_id() -> str:
    """A name, and no secret."""
    return f"{random.getrandbits(128):032x}"  # nosec B311  (a name, and no secret)


def _given_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if given and _REQUEST_ID.fullmatch(given) else ""


def call_it(request: web.Request, number: str) -> str:
    """Give a request its id."""
    request[_ID_KEY] = number
    return number


def request_id(request: web.Request) -> str:
    """The request's own id, or the one that we gave it."""
    return request[_ID_KEY]


def present_request() -> str:
    """The id of the request that this task serves; empty where it serves none."""
    return _present_id.get()


def _control_routes(control: Control, find: Callable[[str], ModelSpec]) -> list[web.RouteDef]:
    def show(view: Callable[[Picture], Any], *, closely: bool = False) -> Handler:
        async def handler(_: web.Request) -> web.Response:
            return web.json_response(view(as_seen(control.look(closely=closely))))

        return handler

    def show_model(view: Callable[[Picture, ModelSpec], Any]) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            spec = find(request.match_info["name"])
            return web.json_response(view(control.look(), spec))

        return handler

    async def health(_: web.Request) -> web.Response:
        picture = control.look()
        # Open to probes without a key, which learn no more than whether all is well.
        shown = views.health(picture) if caller().may(Scope.READ) else {"status": views.health(picture)["status"]}
        return web.json_response(shown, status=200 if picture.alive else 503)

    async def metrics(request: web.Request) -> web.Response:
        body, content_type = exposition(control.meters, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(description())

    async def reload(request: web.Request) -> web.Response:
        if request.query.get("wait") == "0":
            control.reload_soon()
            return web.json_response({"accepted": True}, status=202)
        status = views.config_status((await control.reload()).config)
        return web.json_response(status, status=200 if status["last_attempt"]["ok"] else 400)

    return [
        web.get("/health", health),
        web.get("/vram/status", show(views.vram_status)),
        web.get("/models", _list_models(control)),
        web.get(f"/models/{{name:{_NAME}}}", _show_one(control, find)),
        web.get("/backends", show(views.backends, closely=True)),
        web.get("/backends/{name}", _show_backend(control)),
        web.get("/config", show(views.config)),
        web.get("/metrics", metrics),
        web.get("/openapi.json", describe),
        web.post("/reload", reload),
        dashboard_route(),
        web.get("/v1/models", show(views.openai_models)),
        web.get("/v1/models/{name:.+}", show_model(views.openai_model)),
    ]


def as_seen(picture: Picture) -> Picture:
    """The picture with the models that the caller may use."""
    present = caller()
    if "*" in present.models:
        return picture
    models = {name: spec for name, spec in picture.desired.models.items() if present.may_use(name, spec.aliases)}
    shelf = {name: each for name, each in picture.shelf.items() if present.may_use(name, each.spec.aliases)}
    return replace(picture, desired=replace(picture.desired, models=models), shelf=shelf)


def _list_models(control: Control) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        picture = as_seen(control.look())
        make = functools.partial(_json, listing.models, picture)
        body = await asyncio.to_thread(make) if listing.is_long(picture) else make()
        return web.Response(body=body, content_type="application/json")

    return handler


def _json(view: Callable[[Picture], Any], picture: Picture) -> bytes:
    return json.dumps(view(picture)).encode()


def _show_one(control: Control, find: Callable[[str], ModelSpec]) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        entry = listing.one(as_seen(control.look()), name)
        if entry is None:
            entry = views.model(control.look(), find(name))  # or what is to be said to whoever asks for it
        return web.json_response(listing.with_history(entry, await control.history(ModelName(entry["id"]))))

    return handler


def _show_backend(control: Control) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        picture, name = control.look(closely=True), request.match_info["name"]
        engine = next((e for e in picture.desired.engines.values() if e.name == name), None)
        if engine is None:
            raise RequestError(404, "backend_not_found", f'no backend is called "{name[:64]}"; GET /backends lists them')
        return web.json_response(views.backend(picture, engine))

    return handler


def _middleware(door: Door, ended: Ended, shape: Shape, begun: Begun) -> Any:
    def refuse(request: web.Request, error: RequestError) -> web.StreamResponse:
        if (told := begun(request, error)) is not None:
            return told
        status, body = shape(request.path, error)
        return web.json_response(body, status=status, headers=error.headers)

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        number = call_it(request, _given_id(request) or request.get(_ID_KEY) or new_id())
        _present_id.set(number)
        forget()
        door.settle()
        response: web.StreamResponse | None = None
        refusal: RequestError | None = None
        try:
            with door.patience.of(request):
                response = await _pass(door, request, handler)
        except RequestError as error:
            refusal = error
            response = refuse(request, error)
        except web.HTTPException as error:
            response = refuse(request, _foreign(request, error))
            response.headers.update((name, value) for name, value in error.headers.items() if name == "Allow")
            error.__traceback__ = None  # the library keeps it in the request, which is in every call that it was raised in
        except (ConnectionResetError, web.RequestPayloadError):
            raise
        except Exception:
            said = about(EventKind.INTERNAL_ERROR, request=number)
            log.exception("request %s %s %r failed", number, request.method, request.path, extra=said)
            why = f"offloadd failed on request {number}: its log says why"
            response = refuse(request, RequestError(500, "internal_error", why))
        finally:
            ended(request, number, None if response is None else response.status, refusal)
            refusal = None  # it knows where it was raised, which is in this very call: a ring that would keep the request
        return response

    return around


async def _pass(door: Door, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every check in its order, the cheapest and least telling first; then the handler."""
    access = door.access()
    check_host(request, door.allowed_hosts())
    if answer := preflight(request, access.cors_origins):
        return answer
    check_site(request, access.cors_origins)
    scope = scope_of(request)
    present = _admit(request, access, scope)
    _check_length(request)
    check_query(request)
    request[ADMITTED] = present
    if scope is Scope.ADMIN and request.method != "GET":
        door.meter.steer(present)
        who, said = present.name or "the local user", about(EventKind.ADMIN_CALL, request=request[_ID_KEY], key=present.name)
        log.info("%s %s by %s", request.method, request.path[:200], who, extra=said)
    if scope is Scope.INFERENCE and request.method == "POST":
        with door.meter.admitted(present):
            return await _with_room(door.bodies, request, handler)
    return await handler(request)


async def _with_room(bodies: Bodies, request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler, its body counted while it runs; not where it is passed on as it comes."""
    size = request.content_length
    if (size is not None and size <= SMALL) or not request.can_read_body or is_passed_on(request):
        return await handler(request)
    size = await bodies.room(size, request.client_max_size, request.read)
    try:
        return await handler(request)
    finally:
        bodies.give_back(size)


def _admit(request: web.Request, access: Access, scope: Scope) -> Caller:
    """The caller, if it may make this call; 401 when it has shown no key, 403 when its key does not open this."""
    present = identify(request, access)
    if present.may(scope):
        return present
    if present is ANYBODY:
        raise RequestError(401, "api_key_required", "this server wants an API key: Authorization: Bearer KEY, or X-Api-Key: KEY")
    raise RequestError(403, "scope_missing", f"the key {present.name} lacks the scope {scope}, which this call needs")


def _check_length(request: web.Request) -> None:
    """Refuse a body that says of itself that it is too large before a byte of it is read."""
    length = request.content_length
    if length is not None and length > request.client_max_size:
        raise web.HTTPRequestEntityTooLarge(max_size=request.client_max_size, actual_size=length)


def _foreign(request: web.Request, error: web.HTTPException) -> RequestError:
    """aiohttp's own refusals as ours."""
    messages = {
        404: f"there is nothing at {request.path[:200]}; the README lists the paths",
        405: f"{request.method} is not possible on {request.path[:200]}",
        413: f"the body is larger than {request.client_max_size} bytes (server.max_body)",
    }
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    code = codes.get(error.status, "http_error")
    return RequestError(error.status, code, messages.get(error.status, error.reason))
