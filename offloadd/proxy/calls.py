"""One request as it goes to a backend, and whose its answer is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from offloadd.errors import RequestError
from offloadd.proxy import headers
from offloadd.proxy.account import Account
from offloadd.proxy.headers import Fields
from offloadd.proxy.lease import Lease
from offloadd.proxy.pool import authority
from offloadd.state.ids import BackendName, InstanceId
from offloadd.state.launch import Endpoint
from offloadd.units import Seconds


@dataclass(slots=True, kw_only=True)  # not frozen: that would cost every request as much as the parsing of its body
class Call:
    """One request as it goes to a backend. `path` begins with a slash and may carry a query, already encoded."""

    method: str
    path: str
    fields: Fields
    own: bytes
    """Header lines of ours."""
    account: Account
    body: bytes | None = None
    upload: AsyncIterator[bytes] | None = None
    """A body that is passed on as it comes; `length` says how long it is, if that is known."""
    length: int | None = None
    as_json: bool = False
    """The body is ours, and JSON, whatever the client said of its own."""
    by_path: bool = False
    """Asked for under `/upstream/`: the answer goes back as it is, refusals too."""
    upgrade: bytes = b""
    """The protocol that the connection is to change to."""

    def head(self, endpoint: Endpoint) -> bytes:
        """The request's head, framed, for a server that may have its API elsewhere than below `/v1`."""
        whom = authority(endpoint)
        own = self.own + headers.lines(endpoint.headers.items()) if endpoint.key else self.own
        start = headers.request_head(self.method, endpoint.at(self.path), whom, self.fields, own, as_json=self.as_json)
        if self.upgrade:
            return b"%bConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % (start, self.upgrade)
        if self.upload is not None and self.length is None:
            return start + b"Transfer-Encoding: chunked\r\n\r\n"
        size = self.length if self.upload is not None else None if self.body is None else len(self.body)
        return start + (b"\r\n" if size is None else b"Content-Length: %d\r\n\r\n" % size)


class BackendLostError(RequestError):
    """The backend ended or broke the connection before its answer was whole."""

    def __init__(self, lease: Lease, why: str) -> None:
        host = lease.host
        message = f"the backend {host.instance} ({host.backend}) was lost: {why}"
        super().__init__(502, "backend_lost", message, retry_after=Seconds(1))
        self.instance, self.backend = host.instance, host.backend
        self.suspect = False
        """Whether the request was alone on a process of ours that died: then it is the likeliest to have killed it."""


def origin(lease: Lease) -> dict[str, str]:
    """Headers that say whose answer it is, and why that one was asked."""
    return origin_of(lease.host.instance, lease.host.backend, lease.why)


def origin_of(instance: InstanceId, backend: BackendName, why: str) -> dict[str, str]:
    """The same without a lease."""
    return {"X-Offloadd-Instance": str(instance), "X-Offloadd-Backend": backend, "X-Offloadd-Reason": why}
