"""Attacks on a running daemon, over all of its routes: each with what an attacker would send, and what must come of it."""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from offloadd.api.limits import BODIES, STEERING
from offloadd.api.operations import OPERATIONS, Operation
from offloadd.state.access import Scope
from tests.conformance.servers import HOST, free_port, until
from tests.integration.daemon import CHAT, Daemon, chat, launch, model, running

ROUTES = list(OPERATIONS.values())
OPS, USER = "ops-key-0f9d5c2f6a7b4e3d8c1a", "user-key-7b4e3d8c1a0f9d5c2f6a"
KEYS = [{"name": "ops", "key": OPS, "scopes": ["admin"]}, {"name": "user", "key": USER}]
CHANGING = [each for each in ROUTES if each.method != "GET"]
OPEN_DOOR = """
import http.server, socket, sys
beside = socket.create_server(("0.0.0.0", 0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
FORGER = r"""
import sys
print("\x1b[2J\x1b]0;owned\x07\rMay 1 00:00:00 ERROR forged\x00\u2028<3>forged", file=sys.stderr)
sys.exit(1)
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder, port = tmp_path_factory.mktemp("attacks"), free_port()
    server = {"listen": [f"{HOST}:{port}"], "max_body": "4MiB"}
    with running(folder, {"a": model()}, server=server) as found:
        found.wait_for()
        found.write({"a": model()}, server={**server, "auth": {"keys": KEYS}})
        until(lambda: found.request("GET", "/models").status == 401, "keys are asked for")
        yield found
        found.write({"a": model()}, server=server)
        until(lambda: found.request("GET", "/models").status == 200, "the door is open again")


def shown(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def path_of(operation: Operation) -> str:
    return re.sub(r"\{[^}]*\}", "a", operation.path)


def ids(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


def refused(daemon: Daemon, operation: Operation, **headers: str) -> tuple[int, str]:
    reply = daemon.request(
        operation.method, path_of(operation), None, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    return reply.status, reply.body.decode(errors="replace")


@pytest.mark.parametrize("operation", ROUTES, ids=ids)
def test_a_name_that_was_rebound_reaches_nothing(daemon: Daemon, operation: Operation) -> None:
    """With an admin's key, too: a browser's page may have been given one."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"):
        status, said = refused(daemon, operation, Host=host, **shown(OPS))
        assert status == 403, (host, said)
        assert "does not answer to the name" in said


def test_nor_where_there_is_nothing(daemon: Daemon) -> None:
    assert daemon.request("GET", "/nothing", None, {"Host": "evil.example"}).status == 403


@pytest.mark.parametrize("operation", CHANGING, ids=ids)
def test_another_sites_page_steers_nothing(daemon: Daemon, operation: Operation) -> None:
    evil = (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    )
    for headers in evil:
        status, said = refused(daemon, operation, **headers, **shown(OPS))
        assert status == 403, (headers, said)
        assert "other sites" in said


@pytest.mark.parametrize("operation", ROUTES, ids=ids)
def test_a_route_opens_for_its_scope_alone(daemon: Daemon, operation: Operation) -> None:
    if operation.scope is not Scope.OPEN:
        assert refused(daemon, operation)[0] == 401
        assert refused(daemon, operation, **shown("x" * 28))[0] == 401
    if operation.scope in (Scope.ADMIN, Scope.READ):
        status, said = refused(daemon, operation, **shown(USER))
        assert status == 403, said
        assert "scope" in said


@pytest.mark.parametrize(
    "target",
    [
        "//reload", "/reload/", "/./reload", "/%72eload", "/v1/../reload", "/v1/%2e%2e/reload", "/upstream/a/../../reload",
        "/upstream/a/%2e%2e/%2e%2e/reload", "/reload;x=/v1/models", "/reload?x=/v1/models", "/reload#/v1/models", "\\reload",
        "http://127.0.0.1/reload", "/v1/models/../../models/a/unload", "/upstream/a/slots", "/upstream/a//v1/models/../../slots",
        "/upstream/a/models/unload", "/upstream/a/lora-adapters", "/upstream/a/slots/0?action=save",
    ],
)  # fmt: skip
def test_a_path_that_is_read_in_two_ways_opens_nothing_more(daemon: Daemon, target: str) -> None:
    before, reloads = daemon.request("GET", "/models/a", None, shown(OPS)).json(), daemon.log.count("/reload by")
    with contextlib.closing(socket.create_connection((HOST, daemon.port))) as client:
        client.settimeout(20)
        head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {USER}\r\n"
        client.sendall(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        status = int(client.recv(64).split()[1])
    assert status in (400, 403, 404, 405), status
    assert daemon.log.count("/reload by") == reloads
    after = daemon.request("GET", "/models/a", None, shown(OPS)).json()
    assert [each["pid"] for each in after["offloadd"]["instances"]] == [each["pid"] for each in before["offloadd"]["instances"]]


def test_no_field_of_a_request_says_where_it_goes(daemon: Daemon) -> None:
    """Nobody knocks at an address that a client names, so no key of ours goes there either."""
    with contextlib.closing(socket.create_server((HOST, 0))) as trap:
        there = f"http://{HOST}:{trap.getsockname()[1]}/v1"
        fields = dict.fromkeys(("api_base", "base_url", "proxy", "url", "endpoint", "upstream", "callback_url", "server"), there)
        headers = {**shown(USER), "X-Forwarded-Host": there, "Forwarded": f"host={there}", "X-Api-Base": there}
        assert daemon.request("POST", CHAT, {**chat(), **fields}, headers).status == 200
        trap.settimeout(0.5)
        with pytest.raises(TimeoutError):
            trap.accept()


def test_a_body_that_swells_when_it_is_unpacked(daemon: Daemon) -> None:
    bomb = gzip.compress(bytes(400 * 2**20), 9)
    assert len(bomb) < 2**20
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    reply = daemon.request("POST", CHAT, bomb, {**shown(USER), "Content-Encoding": "gzip", "Content-Type": "application/json"})
    assert reply.status in (400, 413, 415), reply
    assert process.memory_info().rss - before < 100 * 2**20


def test_a_body_in_pieces_of_one_byte_costs_no_more_than_its_bytes(daemon: Daemon) -> None:
    """Twice as many take about twice the work, and not four times."""

    def work(thousands: int) -> float:
        before = psutil.Process(daemon.process.pid).cpu_times()
        with contextlib.closing(socket.create_connection((HOST, daemon.port))) as client:
            client.settimeout(60)
            client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {USER}\r\n".encode())
            client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(thousands):
                client.sendall(b"1\r\n \r\n" * 1000)
            client.sendall(b"0\r\n\r\n")
            assert client.recv(64).split()[1] == b"400"
        after = psutil.Process(daemon.process.pid).cpu_times()
        return after.user + after.system - before.user - before.system

    few, many = work(100), work(400)
    assert many < 8 * few + 0.5, (few, many)


def test_an_address_that_a_network_reaches_is_not_opened_without_keys(tmp_path: Path) -> None:
    port = free_port()
    refusing = launch(tmp_path, {"a": model(run="never")}, server={"listen": [f"0.0.0.0:{port}"]})
    try:
        assert refusing.exit() == 1
        assert "insecure" in refusing.log
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((HOST, port), timeout=5)
    finally:
        refusing.discard()


def test_an_engine_that_opens_a_port_to_the_network_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(OPEN_DOOR)
    backends = {"open": {"kind": "custom", "command": [sys.executable, str(tmp_path / "engine.py"), "${port}"]}}
    models = {"a": {"source": "x", "backends": ["open"], "run": "always", "vram": "16MiB"}}
    with running(tmp_path, models, backends=backends) as daemon:
        daemon.wait_for()
        problems = until(
            lambda: [each["what"] for each in daemon.get("/health")["problems"] if "0.0.0.0:" in each["what"]], "it is told"
        )
        assert problems[0].startswith("a-1")


def test_what_an_engine_prints_passes_for_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(FORGER)
    backends = {"forger": {"kind": "custom", "command": [sys.executable, str(tmp_path / "engine.py"), "${port}"]}}
    models = {"a": {"source": "x", "backends": ["forger"], "run": "always", "vram": "16MiB"}}
    with running(tmp_path, models, backends=backends) as daemon:
        until(lambda: "forged" in daemon.log, "its last words are in the log")
        said = [daemon.log, str(daemon.look()["reason"]), daemon.request("GET", "/explain/a").json().__repr__()]
        for text in said:
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text), repr(text)
        assert not [line for line in daemon.log.splitlines() if re.match(r"\W*(May 1|<3>|forged)", line)]


SQL = ("' OR '1'='1", "'; DROP TABLE models; --", '" OR 1=1 --', "a' UNION SELECT key FROM keys --", "%27%20OR%201=1")


@pytest.mark.parametrize("text", SQL)
def test_sql_in_names_and_keys_is_a_name_that_is_unknown(daemon: Daemon, text: str) -> None:
    assert daemon.request("GET", "/models", None, shown(text)).status == 401
    for path in ("/models/", "/v1/models/", "/explain/", "/backends/"):
        assert daemon.request("GET", path + quote(text, safe=""), None, shown(OPS)).status == 404
    assert daemon.request("POST", CHAT, chat(text), shown(USER)).status == 404
    assert daemon.request("GET", f"/explain?request={quote(text)}", None, shown(OPS)).status in (200, 404)
    assert daemon.request("POST", CHAT, chat("a", 1), shown(USER)).status == 200
    assert daemon.request("GET", "/models/a", None, shown(OPS)).json()["offloadd"]["history"]["days"], "all tables are there"


JUNK = (b"", b"\xff\xfe", b"[]", b"{", b'{"model": 1}', b'{"model": "a", "messages": 7}', b"[" * 5000, b'{"model": "\\ud800"}')
TELLING = re.compile(r'Traceback|File "|0x[0-9a-f]{6,}|site-packages|\.py\b|object at')


@pytest.mark.parametrize("operation", ROUTES, ids=ids)
def test_no_refusal_tells_of_the_inside(daemon: Daemon, operation: Operation) -> None:
    if operation.path in ("/events", "/logs/{instance}"):
        return  # they have no end
    for junk in JUNK if operation.method == "POST" else (b"",):
        headers = {**shown(OPS), "Content-Type": "application/json"}
        reply = daemon.request(operation.method, path_of(operation), junk, headers)
        said = reply.body.decode(errors="replace")
        if reply.status >= 400:
            assert not TELLING.search(said), said
            assert str(daemon.folder) not in said, said
        assert reply.status != 500, said


def test_large_bodies_are_not_all_held_at_once(tmp_path: Path) -> None:
    size, room = 20 << 20, BODIES // (20 << 20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n{{".encode()
    with running(tmp_path, {"a": model()}) as daemon, contextlib.ExitStack() as open_ones:
        daemon.wait_for()
        held = [open_ones.enter_context(socket.create_connection((HOST, daemon.port))) for _ in range(room)]
        for one in held:
            one.sendall(head)

        def one_more() -> bytes:
            with socket.create_connection((HOST, daemon.port)) as late:
                late.settimeout(0.5)
                late.sendall(head)
                with contextlib.suppress(TimeoutError):
                    return late.recv(4096)
                return b""

        answer = until(one_more, "there is no room for one more", 30)
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert b"too_many_bytes" in answer
        assert b"Retry-After: 1" in answer
        assert daemon.chat().status == 200, "a small one is served"
        assert all(_is_silent(one) for one in held)
        for one in held:
            one.close()
        until(lambda: one_more() == b"", "there is room again", 30)


def _is_silent(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return bool(one.recv(1)) and False
    except BlockingIOError:
        return True


def test_flapping_comes_to_an_end_and_hurts_nobody(daemon: Daemon) -> None:
    """Last of all: it uses up what the key may do in a minute."""
    replies = []
    while len(replies) < 3 * STEERING and (not replies or replies[-1].status == 202):  # what is taken comes back bit by bit
        replies.append(daemon.request("POST", "/models/a/load", None, shown(OPS)))
    assert len(replies) >= STEERING - 50
    reply = replies[-1]
    assert (reply.status, reply.json()["error"]["code"]) == (429, "key_steering_calls_limit")
    assert float(reply.headers["Retry-After"]) > 0
    assert daemon.request("POST", CHAT, chat("a", 1), shown(USER)).status == 200
