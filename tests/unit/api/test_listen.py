"""Addresses: who may use a socket file, what is left by the dead, and what a config changes only at the next start."""

from __future__ import annotations

import socket
import stat
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from offloadd.api.guard import check_host
from offloadd.api.listen import allowed_hosts, listen
from offloadd.api.problems import Problems, changed_at_start
from offloadd.errors import PermanentError, RequestError
from offloadd.state.desired import DesiredState, ServerSpec, StorageSpec


async def greet(request: web.Request) -> web.Response:
    try:
        check_host(request, frozenset())
    except RequestError as error:
        return web.Response(status=error.status)
    return web.Response(text="here")


async def running() -> web.AppRunner:
    app = web.Application()
    app.add_routes([web.get("/", greet)])
    runner = web.AppRunner(app)
    await runner.setup()
    return runner


async def test_a_socket_file_is_for_user_and_group_and_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    runner = await running()
    try:
        await listen(runner, f"unix:{path}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get("http://any.name/") as answer,
        ):
            assert (answer.status, await answer.text()) == (200, "here")
    finally:
        await runner.cleanup()


async def test_a_plain_file_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    runner = await running()
    try:
        with pytest.raises(PermanentError, match="cannot listen on"):
            await listen(runner, f"unix:{path}")
        assert path.read_text() == "data"
    finally:
        await runner.cleanup()


def test_socket_files_add_no_host_names() -> None:
    assert allowed_hosts(["unix:/run/x.sock", "[::1]:9000"], ["Box.Lan"]) == {"::1", "box.lan"}


def test_what_only_a_restart_changes_is_named() -> None:
    begun = DesiredState()
    later = replace(begun, server=ServerSpec(listen=("127.0.0.1:1",)), storage=StorageSpec(data_dir="/elsewhere"))
    assert list(changed_at_start(begun, begun)) == []
    assert list(changed_at_start(begun, later)) == ["server.listen", "storage.data_dir"]


def test_a_problem_whose_numbers_change_has_been_there_since_its_begin() -> None:
    problems = Problems()
    (first,) = problems.list({"m backs off: next start in 41 s": ""}, 100.0)
    (later,) = problems.list({"m backs off: next start in 1 min 3 s": ""}, 150.0)
    assert (first.since, later.since) == (100.0, 100.0)
    assert problems.list({}, 160.0) == []
    assert problems.list({"m backs off: next start in 41 s": ""}, 170.0)[0].since == 170.0
