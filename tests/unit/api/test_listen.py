"""Addresses: who may use a socket file, what is left by the dead, and what a config changes only at the next start."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from offloadd.api.guard import check_host
from offloadd.api.listen import KEPT, allowed_hosts, open_listeners
from offloadd.api.problems import Problems, changed_at_start
from offloadd.errors import PermanentError, RequestError
from offloadd.state.access import Access, ApiKey
from offloadd.state.desired import DesiredState, ServerSpec, StorageSpec
from offloadd.systemd import Manager, Received
from tests.fakes.systemd import ServiceManager


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
        listeners = await open_listeners([f"unix:{path}"], Manager())
        await listeners.serve(runner)
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
    with pytest.raises(PermanentError, match="cannot listen on"):
        await open_listeners([f"unix:{path}"], Manager())
    assert path.read_text() == "data"


async def test_an_address_that_is_taken_is_named_and_what_was_bound_before_is_let_go() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, socket.create_server(("127.0.0.1", 0)) as other:
        free, taken = other.getsockname()[1], holder.getsockname()[1]
        other.close()
        with pytest.raises(PermanentError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use") as refused:
            await open_listeners([f"127.0.0.1:{free}", f"127.0.0.1:{taken}"], Manager())
        assert f"sport = :{taken}" in refused.value.hint
        socket.create_server(("127.0.0.1", free)).close()


async def test_a_name_with_several_addresses_is_listened_on_at_each() -> None:
    listeners = await open_listeners(["localhost:0"], Manager())
    assert {one.socket.getsockname()[0] for one in listeners.all} >= {"127.0.0.1"}
    assert listeners.addresses == ("localhost:0",)
    listeners.close()


async def test_sockets_of_units_win_and_kept_ones_are_dropped(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as peer:
        given = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        given[1].bind(str(tmp_path / "api.sock"))
        given[1].listen()
        old = socket.create_server(("127.0.0.1", 0))
        received = [Received("ml-offload-api.socket", sock.detach()) for sock in given]
        manager = Manager(str(peer.address), received=[*received, Received(f"{KEPT}127.0.0.1_9000", old.detach())])
        listeners = await open_listeners(["127.0.0.1:1"], manager)
        assert listeners.activated
        assert all(one.kept for one in listeners.all)
        assert listeners.addresses[1] == f"unix:{tmp_path}/api.sock"
        assert manager.received == []
        assert peer.messages[peer.wait_word("FDSTOREREMOVE")]["FDNAME"] == f"{KEPT}127.0.0.1_9000"
        listeners.close()


async def test_a_socket_unit_that_is_open_to_a_network_needs_keys_as_an_address_in_the_config_does() -> None:
    with socket.create_server(("0.0.0.0", 0)) as wide:
        listeners = await open_listeners([], Manager(received=[Received("ml-offload-api.socket", os.dup(wide.fileno()))]))
    with pytest.raises(PermanentError, match=r"opens 0\.0\.0\.0:") as refused:
        listeners.check(ServerSpec())
    assert "ListenStream=127.0.0.1:9000" in refused.value.hint
    listeners.check(ServerSpec(insecure=True))
    listeners.check(ServerSpec(access=Access(keys=(ApiKey(name="a", digest=b""),))))
    listeners.close()


async def test_kept_sockets_come_back_under_the_configs_addresses_and_the_others_are_dropped(tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as peer:
        wanted = ["127.0.0.1:0", f"unix:{tmp_path}/api.sock"]
        first = await open_listeners([*wanted, "[::1]:0"], Manager(str(peer.address)))
        peer.wait_for(lambda message: message["FDNAME"] == f"{KEPT}[__1]_0", "the last one is kept")
        ports = [one.socket.getsockname() for one in first.all]
        first.close()
        received = [Received(name, os.dup(fd)) for name, fd in peer.stored]
        second = await open_listeners(wanted, Manager(str(peer.address), received=received))
        assert [one.socket.getsockname() for one in second.all] == ports[:2]
        assert all(one.kept for one in second.all)
        peer.wait_for(lambda message: "FDSTOREREMOVE" in message and message["FDNAME"] == f"{KEPT}[__1]_0", "the third is dropped")
        second.close()
        # Clients could no longer find it: it is made anew.
        (tmp_path / "api.sock").unlink()
        received = [Received(name, os.dup(fd)) for name, fd in peer.stored]
        third = await open_listeners(wanted, Manager(str(peer.address), received=received))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "api.sock"))
        third.close()
        manager = Manager(str(peer.address))
        manager.alive()
        peer.wait_word("WATCHDOG")
        assert sorted(name for name, _ in peer.stored) == [f"{KEPT}127.0.0.1_0", f"{KEPT}unix_{tmp_path}/api.sock"]


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
