"""What each route needs of its caller. A route that is not listed here needs `admin`: nothing is open by being forgotten."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

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

SCOPES: Mapping[tuple[str, str], Scope] = {
    ("GET", "/health"): Scope.OPEN,
    ("GET", "/openapi.json"): Scope.OPEN,
    ("GET", "/ui"): Scope.OPEN,
    ("GET", "/"): Scope.OPEN,
    ("GET", "/api/version"): Scope.OPEN,
    **dict.fromkeys(
        (
            ("GET", "/models"),
            ("GET", "/models/{name}"),
            ("GET", "/vram/status"),
            ("GET", "/backends"),
            ("GET", "/backends/{name}"),
            ("GET", "/explain"),
            ("GET", "/explain/{model}"),
            ("GET", "/events"),
            ("GET", "/metrics"),
        ),
        Scope.READ,
    ),
    **dict.fromkeys(
        (
            ("POST", "/inference"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/{name}"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/embeddings"),
            ("POST", "/v1/messages"),
            ("POST", "/v1/messages/count_tokens"),
            ("POST", "/api/chat"),
            ("POST", "/api/generate"),
            ("POST", "/api/embed"),
            ("POST", "/api/embeddings"),
            ("POST", "/api/show"),
            ("GET", "/api/tags"),
            ("GET", "/api/ps"),
        ),
        Scope.INFERENCE,
    ),
    **dict.fromkeys(
        (
            ("GET", "/config"),
            ("POST", "/reload"),
            ("POST", "/borrow"),
        ),
        Scope.ADMIN,
    ),
}


def scope_of(request: web.Request) -> Scope:
    """What this request needs, by the route that it matched: never by its URL's text, which can be written in many ways."""
    resource = request.match_info.route.resource
    if resource is None:
        return Scope.READ  # nothing is there: whoever may look may learn that
    path = resource.canonical
    if path == UPSTREAM:
        return _of_upstream(request)
    method = "GET" if request.method == "HEAD" else request.method
    return SCOPES.get((method, path), Scope.ADMIN)


def _of_upstream(request: web.Request) -> Scope:
    path = "/" + request.match_info["path"]
    computes = path in _UPSTREAM_INFERENCE or path.startswith("/v1/")
    return Scope.INFERENCE if computes and request.method == "POST" else Scope.ADMIN
