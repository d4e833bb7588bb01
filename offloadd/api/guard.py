"""Who may speak to us at all: no other name for this machine, and no page of another site."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Collection

from aiohttp import web

from offloadd.errors import RequestError

_CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_LOADING = "/upstream/"
"""Below it, a GET too may load a model, and have another one leave for it."""
_FORBIDDEN_IN_HOST = frozenset("/?#@\\")


def check_host(request: web.Request, allowed: Collection[str]) -> None:
    """Refuse a Host that is not loopback, not an address that we listen on and not allowed by the config.

    A page whose own name was made to resolve to this machine (DNS rebinding) would otherwise be let in by the browser.
    """
    hosts = request.headers.getall("Host", [])
    if len(hosts) > 1 or (hosts and not _FORBIDDEN_IN_HOST.isdisjoint(hosts[0])):
        raise RequestError(400, "bad_host", "the request's Host header is not a host name")
    if request.transport is not None and not request.remote:
        return  # a UNIX socket: no browser can be made to speak to it
    name = _without_port(hosts[0]).lower() if hosts else ""
    if name not in allowed and not _is_loopback(name):
        message = f'this server does not answer to the name "{name[:128]}"; add it to server.allowed_hosts if it should'
        raise RequestError(403, "host_not_allowed", message)


def check_site(request: web.Request, origins: Collection[str]) -> None:
    """Refuse calls that a browser makes for another site's page and that would cost or change something.

    `origins` are the sites that the config lets in. A browser says where a page comes from in `Origin`, also where it is too old
    for `Sec-Fetch-Site`; other clients say neither.
    """
    if request.method not in _CHANGING and not request.path.startswith(_LOADING):
        return
    origin = request.headers.get("Origin", "").lower()
    if origin and origin in origins:
        return
    if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") or (origin and not _is_same_site(request, origin)):
        raise RequestError(403, "cross_site", "calls from other sites' pages are not accepted; see server.cors_origins")


def cors_headers(request: web.Request, origins: Collection[str]) -> dict[str, str]:
    """What lets a page of a site named in the config read the answer; never with cookies, which we have none of."""
    origin = request.headers.get("Origin", "").lower()
    if not origins:
        return {}
    return {"Vary": "Origin", **({"Access-Control-Allow-Origin": origin} if origin in origins else {})}


def preflight(request: web.Request, origins: Collection[str]) -> web.Response | None:
    """The answer to a browser that asks whether a page may call; None when that is not what is asked."""
    asked = request.headers.get("Access-Control-Request-Method")
    if request.method != "OPTIONS" or asked is None or request.headers.get("Origin", "").lower() not in origins:
        return None
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id, Anthropic-Version",
        "Access-Control-Max-Age": "600",
    }
    return web.Response(status=204, headers=allowed)


def _is_same_site(request: web.Request, origin: str) -> bool:
    return origin.partition("://")[2] == request.headers.get("Host", "").lower()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].split("]", 1)[0]
    return host.rsplit(":", 1)[0] if ":" in host else host


@functools.lru_cache(maxsize=256)
def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
