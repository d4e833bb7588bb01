"""What a request needs of its caller. A route that the table of operations lacks needs `admin`: nothing is open by oversight."""

from __future__ import annotations

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
    resource = request.match_info.route.resource
    method = "GET" if request.method == "HEAD" else request.method
    return None if resource is None else OPERATIONS.get((method, resource.canonical))


def check_query(request: web.Request) -> None:
    """Refuse values of query parameters that are none of those described. Others than those are not ours to judge."""
    operation = operation_of(request)
    for name, schema in ((operation and operation.query) or {}).items():
        given = request.query.getall(name, [])
        allowed = schema.get("enum")
        if len(given) > 1 or (given and allowed is not None and given[0] not in allowed):
            message = f"{name}: expected {' or '.join(allowed)}" if allowed else f"{name} is given twice"
            raise RequestError(400, "invalid_query", message, param=name)


def scope_of(request: web.Request) -> Scope:
    """What this request needs, by the route that it matched: never by its URL's text, which can be written in many ways."""
    resource = request.match_info.route.resource
    if resource is None:
        return Scope.READ  # nothing is there: whoever may look may learn that
    path = resource.canonical
    if path == UPSTREAM:
        return _of_upstream(request)
    operation = operation_of(request)
    return Scope.ADMIN if operation is None else operation.scope


def _of_upstream(request: web.Request) -> Scope:
    path = "/" + request.match_info["path"]
    computes = path in _UPSTREAM_INFERENCE or path.startswith("/v1/")
    return Scope.INFERENCE if computes and request.method == "POST" else Scope.ADMIN
