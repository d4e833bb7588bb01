"""Who makes a request: by key, or by the peer of a UNIX socket."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from collections.abc import Sequence
from contextvars import ContextVar
from hmac import compare_digest

from aiohttp import web

from offloadd.errors import RequestError
from offloadd.state.access import ANYBODY, EVERYTHING, Access, ApiKey, Caller

_UCRED = struct.Struct("3i")
_present: ContextVar[Caller] = ContextVar("caller", default=EVERYTHING)


def caller() -> Caller:
    """Who made the request that this task serves."""
    return _present.get()


def forget() -> None:
    """Of whoever this task's context was made for nothing is known any more: a request has come whose caller is not yet known."""
    _present.set(EVERYTHING)


def identify(request: web.Request, access: Access) -> Caller:
    """The caller, remembered for the rest of the request; RequestError 401 when the key that it shows is none of ours."""
    found = _identify(request, access)
    _present.set(found)
    return found


def _identify(request: web.Request, access: Access) -> Caller:
    if not access.keys or _is_own_user(request):
        return EVERYTHING
    shown = _keys_shown(request)
    if not shown:
        return ANYBODY
    if len(set(shown)) > 1:
        raise RequestError(401, "invalid_api_key", "the request shows two different keys")
    key = _find(shown[0], access.keys)
    if key is None:
        raise RequestError(401, "invalid_api_key", "the request's key is not one that this server knows")
    return Caller(name=key.name, scopes=key.scopes, models=key.models, limits=key.limits)


def _keys_shown(request: web.Request) -> list[str]:
    """`Authorization: Bearer …`, as OpenAI's clients send it, and `x-api-key`, as Anthropic's do."""
    headers = request.headers.getall("Authorization", [])
    bearers = [value[7:].strip() for value in headers if value[:7].lower() == "bearer "]
    return [key for key in (*bearers, *request.headers.getall("X-Api-Key", [])) if key]


def _find(secret: str, keys: Sequence[ApiKey]) -> ApiKey | None:
    """Compares with all of them, each in constant time: how long it takes tells nothing of how near the secret was."""
    digest = hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
    found: ApiKey | None = None
    for key in keys:
        if compare_digest(digest, key.digest):
            found = key
    return found


def _is_own_user(request: web.Request) -> bool:
    """Whether the peer is root or our own user on a UNIX socket: either could read the keys and the memory that holds them."""
    uid = peer_uid(request)
    return uid is not None and uid in (0, os.geteuid())


def peer_uid(request: web.Request) -> int | None:
    """The user at the other end of a UNIX socket, by the kernel's word; None for any other connection."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    try:
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    return int(uid)
