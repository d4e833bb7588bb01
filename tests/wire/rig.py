"""The data plane in this process: the real API on a real port, real leases, and an engine that is a script."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from aiohttp import web

from offloadd.api.app import Door, answer_headers, build_app, new_id, request_id
from offloadd.api.caller import caller
from offloadd.api.express import Lane
from offloadd.api.front import Fronts, Runner
from offloadd.api.limits import KeyMeter
from offloadd.api.patience import Patience
from offloadd.clock import SystemClock
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects.refusals import shaped
from offloadd.proxy.endpoints.responses import Responses
from offloadd.proxy.express import Express
from offloadd.proxy.gateway import FORWARDED, Gateway
from offloadd.proxy.lease import Host
from offloadd.proxy.leases import LeaseBook
from offloadd.proxy.pool import Pool
from offloadd.state.access import EVERYTHING, Access
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint, EngineApi
from offloadd.state.served import Served

HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"
NAME = ModelName("a")
Script = Callable[["Peer"], Awaitable[None]]
LIMIT_S = 20.0
known_heads: ContextVar[bool] = ContextVar("known_heads", default=False)
"""Whether the daemon has seen heads such as a `Client` sends before the first request comes, so that it need not judge them."""


@dataclass
class Peer:
    """One connection to the engine, as its script sees it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int
    head: bytes = b""
    body: bytes = b""

    async def request(self) -> bool:
        """Read one request; False when the client has left instead."""
        try:
            self.head = await self.reader.readuntil(b"\r\n\r\n")
            if b"transfer-encoding: chunked" in self.head.lower():
                self.body = await self._chunks()
            else:
                self.body = await self.reader.readexactly(self.length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        return True

    async def _chunks(self) -> bytes:
        whole = b""
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            whole += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return whole

    @property
    def length(self) -> int:
        lines = self.head.lower().split(b"\r\n")
        return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def flush(self) -> None:
        await self.writer.drain()

    async def left(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


@dataclass
class Engine:
    """Runs the script for every connection that is made to it."""

    script: Script
    port: int = 0
    connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    problems: list[BaseException] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        peer = Peer(reader, writer, self.connections)
        self.open.add(writer)
        try:
            while await peer.request():
                self.heads.append(peer.head)
                await self.script(peer)
                if writer.is_closing():
                    break
        except ConnectionError:
            pass
        except RuntimeError as problem:
            if "handler is closed" not in str(problem):  # as uvloop says that a connection is closed
                self.problems.append(problem)
        except Exception as problem:
            self.problems.append(problem)
        finally:
            self.open.discard(writer)
            writer.close()


@dataclass
class Rules:
    """The config in force, as far as the door asks for it."""

    access: Access = field(default_factory=Access)
    hosts: frozenset[str] = frozenset()


@dataclass
class Rig:
    """The data plane with its engine, and a client's view of it."""

    engine: Engine
    port: int
    pool: Pool
    book: LeaseBook
    spec: ModelSpec
    accounts: Accounts
    ended: list[Served]
    hosts: list[Host]
    gateway: Gateway
    fronts: Fronts
    rules: Rules
    lane: Lane
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection(HOST, self.port, limit=2**20))
        self.clients.append(client)
        return client

    async def ask(self, body: Any = None, path: str = CHAT, method: str = "POST", headers: str = "") -> tuple[int, bytes, bytes]:
        """One request on a connection of its own: status, head, body."""
        client = await self.connect()
        try:
            client.send(body, path, method, headers)
            return await client.answer(bodiless=method == "HEAD")
        finally:
            client.close()

    def aim(self, port: int) -> None:
        """The instance listens elsewhere from now on."""
        self.hosts[:] = [replace(host, endpoint=Endpoint(host=HOST, port=port)) for host in self.hosts]

    @property
    def served(self) -> list[Served]:
        """What became of every request that is over."""
        self.accounts.flush()
        return self.ended

    @property
    def load(self) -> int:
        return sum(self.book.demand().leases.values())

    async def quiet(self) -> None:
        """Until no lease is held and no connection of ours is busy; what nobody ends fails the test."""
        await until(lambda: self.load == 0 and self.pool.busy == 0, "all is over")


@dataclass
class Client:
    """A client that says what bytes it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, body: Any = None, path: str = CHAT, method: str = "POST", headers: str = "") -> None:
        data = b"" if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
        framing = f"Content-Length: {len(data)}\r\n" if data or method == "POST" else ""
        self.raw(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}{framing}\r\n".encode() + data)

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, bytes]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), LIMIT_S)
        return int(head.split(None, 2)[1]), head

    async def answer(self, *, bodiless: bool = False) -> tuple[int, bytes, bytes]:
        status, head = await self.head()
        return status, head, b"" if bodiless else await self.body(head)

    async def body(self, head: bytes) -> bytes:
        low = head.lower()
        if b"transfer-encoding: chunked" in low:
            whole = b""
            while piece := await self.chunk():
                whole += piece
            return whole
        sizes = [int(line.split(b":")[1]) for line in low.split(b"\r\n") if line.startswith(b"content-length:")]
        if sizes:
            return await asyncio.wait_for(self.reader.readexactly(sizes[0]), LIMIT_S)
        if low.split(None, 2)[1] in (b"204", b"304"):
            return b""
        return await self.rest()

    async def chunk(self) -> bytes:
        """The next chunk; nothing at the end, whose trailer is kept in `trailer`."""
        size = int(await asyncio.wait_for(self.reader.readuntil(b"\r\n"), LIMIT_S), 16)
        if size == 0:
            self.trailer = b""
            while (line := await asyncio.wait_for(self.reader.readuntil(b"\r\n"), LIMIT_S)) != b"\r\n":
                self.trailer += line
            return b""
        data = await asyncio.wait_for(self.reader.readexactly(size + 2), LIMIT_S)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return await asyncio.wait_for(self.reader.read(-1), LIMIT_S)

    def close(self) -> None:
        self.writer.transport.abort()


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition, generously."""
    deadline = asyncio.get_running_loop().time() + LIMIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {LIMIT_S:g} s: {what}"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def rigged(
    script: Script, *, cancels_only_streams: bool = False, slots: int = 1000, unix: str = "", **spec_changes: Any
) -> AsyncIterator[Rig]:
    """Have it run, and see at the end that nothing is left over."""
    engine = Engine(script)
    if unix:
        server = await asyncio.start_unix_server(engine.serve, unix)
    else:
        server = await asyncio.start_server(engine.serve, HOST, 0)
        engine.port = server.sockets[0].getsockname()[1]
    spec = ModelSpec(name=NAME, source="x", backends=(BackendName("llamacpp"), BackendName("vllm")), **spec_changes)
    desired = DesiredState(models={NAME: spec})
    endpoint = Endpoint(host=unix or HOST, port=engine.port)
    backend = BackendName("llamacpp")
    api = EngineApi(spare=True)
    common = {"slots": slots, "sign": lambda: None, "cancels_only_streams": cancels_only_streams, "api": api}
    hosts = [Host(instance=InstanceId(LOCAL, NAME, 1), backend=backend, endpoint=endpoint, **common)]  # type: ignore[arg-type]
    clock = SystemClock()
    served: list[Served] = []
    book = LeaseBook(clock=clock, hosts=lambda _: hosts, decision=lambda _: None, wake=lambda: None)
    accounts = Accounts(clock, served.append, lambda: "")
    rules = Rules()
    door = Door(
        access=lambda: rules.access,
        allowed_hosts=lambda: rules.hosts,
        meter=KeyMeter(clock),
        patience=Patience(clock, 4096),
        settle=accounts.flush,
    )
    pool = Pool()
    gateway = Gateway(
        book=book,
        desired=lambda: desired,
        pool=pool,
        api_of=lambda _spec, _engine: EngineApi(),
        request_id=request_id,
        bears=lambda request: answer_headers(request, door),
        accounts=accounts,
        may_use=lambda spec: caller().may_use(spec.name, spec.aliases),
    )
    routes = [*gateway.routes(), *Responses(gateway, accounts, lambda _spec, _engine: EngineApi()).routes()]
    app = build_app(None, routes, gateway.find, door, accounts.close, shaped, gateway.tell_begun)  # type: ignore[arg-type]
    express = Express(lambda: gateway.names, book, pool, accounts, new_id)
    lane = Lane(door.access, door.allowed_hosts, express.take, pool.turn)
    if known_heads.get():
        for path in FORWARDED:
            fields = ((b"Host", b"localhost"), (b"Content-Length", b"1"))
            head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n" % path.encode()
            lane.learn(lane.mark(head + b"x"), path, fields, EVERYTHING, keep_alive=True)
    options = {"handler_cancellation": True, "access_log": None, "shutdown_timeout": 0.1}
    runner = Runner(app, door.patience, door.max_body, lane, **options)
    await runner.setup()
    fronts = runner.fronts
    assert fronts is not None
    listener = socket.create_server((HOST, 0), backlog=1024)
    port = listener.getsockname()[1]
    await web.SockSite(runner, listener).start()
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    rig = Rig(engine, port, pool, book, spec, accounts, served, hosts, gateway, fronts, rules, lane)
    try:
        yield rig
        await rig.quiet()
    finally:
        for client in rig.clients:
            client.close()
        await runner.cleanup()
        await gateway.close()
        pool.close()
        server.close()
        for writer in list(engine.open):
            writer.transport.abort()
        await until(lambda: not engine.open and not pool.size, f"none left: {engine.open} {pool._open}")
    assert not engine.problems, engine.problems
    assert not complaints, complaints


def chunked(*pieces: bytes) -> bytes:
    """A body in chunks, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def sse(*payloads: Any) -> list[bytes]:
    return [b"data: " + (payload if isinstance(payload, bytes) else msgspec.json.encode(payload)) + b"\n\n" for payload in payloads]


def word(text: str, **more: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **more}]}


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}
ASK_STREAM = {**ASK, "stream": True}
