"""Connections to instances, and what of a message's headers crosses the proxy."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
    }
    | {"upgrade", "content-length", "expect"}
)
"""Headers that belong to one connection. Lengths are ours to say, because we frame the body anew."""
_NOT_TO_BACKENDS = frozenset(
    {"host", "authorization", "cookie", "x-api-key", "accept-encoding", "origin", "forwarded"} | {"content-encoding"}
)
"""Credentials are for offloadd; a backend that saw Origin would answer for itself who may read it; a body arrives here unpacked."""
_NOT_TO_CLIENTS = frozenset({"server", "date", "access-control-allow-origin", "access-control-allow-credentials"})

CONNECT_TIMEOUT = 5.0
READ_BUFFER = 64 * 1024


def open_session() -> aiohttp.ClientSession:
    """The pool of connections to instances. No total timeout: an answer takes as long as it takes.

    A connection is used once: llama-server closes those of streams without saying so, and a reused one would lose a request now and
    then.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True, enable_cleanup_closed=False)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        read_bufsize=READ_BUFFER,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def to_backend(headers: Mapping[str, str], request_id: str, shown: Mapping[str, str]) -> CIMultiDict[str]:
    """Request headers that a backend may see; `shown` are those that open its door to us."""
    kept = _kept(headers, _NOT_TO_BACKENDS)
    kept.update(shown)
    kept["X-Request-Id"] = request_id
    kept["Accept-Encoding"] = "identity"  # what comes is read and put together here, and a token is too short to compress
    return kept


def to_client(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Response headers that a client may see."""
    return _kept(headers, _NOT_TO_CLIENTS)


def _kept(headers: Mapping[str, str], dropped: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    drop = HOP_BY_HOP | dropped | named
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in drop)
