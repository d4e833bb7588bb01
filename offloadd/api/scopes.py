"""What a request needs of its caller. A route that the table of operations lacks needs `admin`: nothing is open by oversight."""

from __future__ import annotations

import functools

from aiohttp import web

from offloadd.api.operations import OPERATIONS, Operation
from offloadd.errors import RequestError
from offloadd.state.access import Scope

UPSTREAM = "/upstream/{model}/{path}"
_UPSTREAM_INFERENCE = frozenset(
    f"/{path}"
    for path in (
        *("completion", "completions", "infill", "embedding", "embeddings", "rerank", "reranking"),
        *("tokenize", "detokenize", "apply-template", "generate", "generate_stream", "chat_tokenize"),
    )
)
"""Paths of engines, below `/upstream/{model}`, that only compute. Others may show prompts of others, or change the server."""


def operation_of(request: web.Request) -> Operation | None:
    """The operation that the request's route is, by the route that it matched: never by its URL's text."""
    return _of_route(request.match_info.route, "GET" if request.method == "HEAD" else request.method)


@functools.lru_cache(maxsize=1024)  # more than there are routes and methods
def _of_route(route: web.AbstractRoute, method: str) -> Operation | None:
    return None if route.resource is None else OPERATIONS.get((method, route.resource.canonical))


def check_query(request: web.Request) -> None:
    """Refuse values of query parameters that are none of those described. Others than those are not ours to judge."""
    operation = operation_of(request)
    if operation is None or operation.query is None:
        return
    for name, schema in operation.query.items():
        given = request.query.getall(name, [])
        allowed = schema.get("enum")
        if len(given) > 1 or (given and allowed is not None and given[0] not in allowed):
            message = f"{name}: expected {' or '.join(allowed)}" if allowed else f"{name} is given twice"
            raise RequestError(400, "invalid_query", message, param=name)


def is_passed_on(request: web.Request) -> bool:
    """Whether the request goes to an engine by its path, and its body as it comes."""
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical == UPSTREAM


def scope_of(request: web.Request) -> Scope:
    """What this request needs, by the route that it matched: never by its URL's text, which can be written in many ways."""
    operation = operation_of(request)
    if operation is not None and operation.path != UPSTREAM:
        return operation.scope
    resource = request.match_info.route.resource
    if resource is None:
        return Scope.READ  # nothing is there: whoever may look may learn that
    return _of_upstream(request) if resource.canonical == UPSTREAM else Scope.ADMIN


def _of_upstream(request: web.Request) -> Scope:
    path = "/" + request.match_info["path"]
    computes = path in _UPSTREAM_INFERENCE or path.startswith("/v1/")
    return Scope.INFERENCE if computes and request.method == "POST" else Scope.ADMIN
