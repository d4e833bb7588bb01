"""Speaking to a daemon: over TCP and UNIX sockets, with a key, and what is said when it goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from offloadd.client import RefusedError, Server, query
from offloadd.errors import OffloaddError


@asynccontextmanager
async def listening(path: Path, handler: Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]) -> AsyncIterator[Server]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield Server(f"unix:{path}", "secret")
    finally:
        await runner.cleanup()


async def ask(server: Server, path: str = "/x", **more: Any) -> tuple[int, Any]:
    async with server.session() as session:
        return await server.ask(session, "POST", path, **more)


async def test_a_socket_a_key_and_a_path_as_it_is(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response([request.raw_path, request.headers["Authorization"], await request.json()])

    async with listening(tmp_path / "s", echo) as server:
        assert await ask(server, "/models/org%2FB:1/load?wait=1", body={"a": 1}) == (
            200,
            ["/models/org%2FB:1/load?wait=1", "Bearer secret", {"a": 1}],
        )
    assert "secret" not in repr(server)


@pytest.mark.parametrize(
    ("status", "headers", "hint"),
    [(401, {}, "OFFLOADD_KEY"), (403, {}, "scope"), (429, {"Retry-After": "7"}, "try again in 7 s"), (404, {}, "")],
)
async def test_a_refusal_is_told_in_the_daemons_words(tmp_path: Path, status: int, headers: dict[str, str], hint: str) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no, because", "code": "why"}}, status=status, headers=headers)

    async with listening(tmp_path / "s", refuse) as server:
        with pytest.raises(RefusedError, match="no, because") as refused:
            await ask(server)
    assert (refused.value.status, refused.value.code) == (status, "why")
    assert hint in refused.value.hint


async def test_what_is_no_offloadd_is_said_so(tmp_path: Path) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>")

    async with listening(tmp_path / "s", page) as server:
        with pytest.raises(OffloaddError, match="not JSON"):
            await ask(server)


async def test_one_that_says_nothing(tmp_path: Path) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with listening(tmp_path / "s", hang) as server:
        with pytest.raises(OffloaddError, match=r"nothing came within 0\.2 s"):
            await ask(server, within_s=0.2)


async def hear(events: AsyncIterator[tuple[str, str]], heard: list[tuple[str, str]]) -> None:
    async for event in events:
        heard.append(event)  # noqa: PERF401  (what was heard before it breaks counts)


async def test_events_in_pieces_and_a_connection_that_breaks(tmp_path: Path) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in (b": hello\n\nevent: a\r\nda", b'ta: {"x":\r\ndata: 1}\r\n\r\n', b"data: last\n\ndata: no end"):
            await response.write(piece)
            await asyncio.sleep(0)
        assert request.transport
        request.transport.abort()
        return response

    heard: list[tuple[str, str]] = []
    async with listening(tmp_path / "s", stream) as server, server.session() as session:
        with pytest.raises(OffloaddError, match="broke off"):
            await hear(server.events(session, "GET", "/events"), heard)
    assert heard == [("a", '{"x":\n1}'), ("", "last")]


def test_addresses() -> None:
    assert str(Server("127.0.0.1:9000").url) == "http://127.0.0.1:9000"
    assert Server("http://localhost:9000/").is_here
    assert Server("unix:/run/x.sock").is_here
    assert Server("http://[::1]:9000").is_here
    assert not Server("https://gpu.example").is_here
    for wrong in ("ftp://x", "http://", "x:y", ""):
        with pytest.raises(OffloaddError, match="no address"):
            Server(wrong).url  # noqa: B018


def test_queries() -> None:
    assert query(a=1, b=None, c="x y") == "?a=1&c=x+y"
    assert query(a=None) == ""


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(OffloaddError, match="No such file") as absent:
        Server(f"unix:{tmp_path}/absent").get("/health")
    assert "is the daemon running?" in absent.value.hint
    with pytest.raises(OffloaddError, match="Connection refused"):
        Server("127.0.0.1:1").get("/health")
