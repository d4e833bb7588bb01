"""Speaks to a running daemon from outside: one JSON answer, or an answer that is read as it comes."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from offloadd import __version__
from offloadd.errors import OffloaddError

DEFAULT_SERVER = "http://127.0.0.1:9000"
ANSWER_S = 60
"""An answer that is not said to take long is waited for so long."""
_CONNECT_S = 5
_MAX_LINE = 16 * 2**20
_UNIX = "unix:"
_RUNNING = "is the daemon running? systemctl status ml-offload-api; another address goes into --server or OFFLOADD_SERVER"
_HINTS = {
    401: "put the API key into OFFLOADD_KEY",
    403: "the key in OFFLOADD_KEY does not open this: it needs one with the scope admin, or for this model",
}


class RefusedError(OffloaddError):
    """The daemon answered, and says no; its own words are the message."""

    def __init__(self, message: str, *, status: int, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Server:
    """The daemon that is spoken to, at `http://host:port`, `host:port` or `unix:/path`."""

    address: str
    key: str = field(default="", repr=False)
    """Sent as a bearer token when it is given."""

    @property
    def socket(self) -> str:
        """Path of its UNIX socket; empty for one that is reached over TCP."""
        return self.address.removeprefix(_UNIX) if self.address.startswith(_UNIX) else ""

    @property
    def url(self) -> URL:
        """What paths are joined to; the host of a UNIX socket means nothing."""
        if self.socket:
            return URL("http://localhost")
        text = self.address if "://" in self.address else f"http://{self.address}"
        try:
            url = URL(text.rstrip("/"))
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise OffloaddError(f'"{self.address}" is no address of a daemon', hint="write http://host:port, or unix:/path")
        return url

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, as far as its address tells."""
        host = self.url.host or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def get(self, path: str) -> Any:
        """GET; the JSON answer. OffloaddError says what went wrong."""
        return self.call("GET", path)[1]

    def post(self, path: str, body: Any = None, *, within_s: float | None = ANSWER_S) -> tuple[int, Any]:
        """POST; the status and the JSON answer."""
        return self.call("POST", path, body, within_s=within_s)

    def call(self, method: str, path: str, body: Any = None, *, within_s: float | None = ANSWER_S) -> tuple[int, Any]:
        """One request, outside an event loop."""

        async def ask() -> tuple[int, Any]:
            async with self.session() as session:
                return await self.ask(session, method, path, body, within_s=within_s)

        return asyncio.run(ask())

    def session(self) -> aiohttp.ClientSession:
        """Connections to it; close it."""
        headers = {"User-Agent": f"offloadctl/{__version__}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connector = aiohttp.UnixConnector(self.socket) if self.socket else aiohttp.TCPConnector()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        return aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout, read_bufsize=2**20)

    async def ask(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None, *, within_s: float | None = ANSWER_S
    ) -> tuple[int, Any]:
        """One request; the status and the JSON answer."""
        try:
            async with asyncio.timeout(within_s):
                async with self.open(session, method, path, body) as answer:
                    return answer.status, await _json(answer)
        except TimeoutError:
            raise self._silent(f"nothing came within {within_s:g} s") from None

    @asynccontextmanager
    async def open(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, up to the answer's headers. RefusedError when it is an error object."""
        begun = False
        try:
            async with session.request(method, self.url.join(URL(path, encoded=True)), json=body) as answer:
                begun = True
                if answer.status >= 400:
                    await _refuse(self.address, answer)
                yield answer
        except (aiohttp.ClientError, OSError) as error:
            what = _words(error)
            if begun:
                raise OffloaddError(f"the answer from {self.address} broke off: {what}", hint=_RUNNING) from None
            raise self._silent(what, error.errno if isinstance(error, OSError) else None) from None

    async def events(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None
    ) -> AsyncIterator[tuple[str, str]]:
        """An answer in server-sent events: kind and data of each, as they come."""
        async with self.open(session, method, path, body) as answer:
            kind, data = "", list[str]()
            async for line in lines(answer):
                name, _, value = line.partition(":")
                if not line and data:
                    yield kind, "\n".join(data)
                if not line:
                    kind, data = "", []
                elif name == "event":
                    kind = value.strip()
                elif name == "data":
                    data.append(value.removeprefix(" "))

    def _silent(self, what: str, cause: int | None = None) -> OffloaddError:
        hint = _RUNNING
        if self.socket and cause == errno.EACCES:
            hint = "the socket is not yours to use: join its group, or run the command as a user who may"
        return OffloaddError(f"no answer from {self.address}: {what}", hint=hint)


async def lines(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Lines of an answer as they come, without their ends."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")
        if len(rest) > _MAX_LINE:
            raise OffloaddError("the answer has a line without an end", hint="is this the address of an offloadd?")
    if rest:
        yield rest.decode(errors="replace")


def query(**values: str | int | None) -> str:
    """`?a=1&b=2` of those that are given, or nothing."""
    return str(URL.build(query={name: value for name, value in values.items() if value is not None}))


async def _refuse(address: str, answer: aiohttp.ClientResponse) -> None:
    """Raise what an error object says; an answer of another shape is left to the caller."""
    body = await _json(answer)
    error: Mapping[str, Any] | None = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and "message" in error:
        hint = _HINTS.get(answer.status, "")
        wait = answer.headers.get("Retry-After", "")
        hint = hint or (f"try again in {wait} s" if wait else "")
        message = f"{address} refuses: {error['message']}"
        raise RefusedError(message, status=answer.status, code=str(error.get("code", "")), hint=hint)


async def _json(answer: aiohttp.ClientResponse) -> Any:
    text = await answer.text(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        message = f"{answer.url.path} answered {answer.status} with something that is not JSON"
        raise OffloaddError(message, hint="is this the address of an offloadd? GET /health of one says so") from None


def _words(error: Exception) -> str:
    """What the system said, without what the library adds to it."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno is not None and error.os_error.errno > 0:
        return os.strerror(error.os_error.errno)
    return str(error) or type(error).__name__
