"""Keys on a running daemon: who is let in, what each scope opens, and that no secret comes out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import HOST, Reply, free_port, until
from tests.integration.daemon import CHAT, Daemon, chat, model, running
from tests.integration.engines import daemon_of, served_by

ADMIN = "admin-key-0f9d5c2f6a7b4e3d8c1a"
USER = "user-key-7b4e3d8c1a0f9d5c2f6a"
READER = "reader-key-4e3d8c1a0f9d5c2f6a7b"
FEW = "few-key-e3d8c1a0f9d5c2f6a7b4"
ROTATED = "rotated-key-1a0f9d5c2f6a7b4e3d8c"
NOBODY = 65534
SECRETS = (ADMIN, USER, READER, FEW, ROTATED)


def keys() -> list[dict[str, Any]]:
    return [
        {"name": "ops", "key": "${env:ADMIN_KEY}", "scopes": ["admin"]},
        {"name": "user", "key": "${env:USER_KEY}", "models": ["a", "nick*"]},
        {"name": "reader", "key": "${env:READER_KEY}", "scopes": ["read"]},
        {"name": "few", "key": "${env:FEW_KEY}", "limits": {"requests_per_minute": 2}},
    ]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("keys")
    models = {"a": model(), "b": model(aliases=["nickname"]), "c": model()}
    env = {"ADMIN_KEY": ADMIN, "USER_KEY": USER, "READER_KEY": READER, "FEW_KEY": FEW, "ROTATED_KEY": ROTATED}
    with running(folder, models, env=env) as found:
        for name in models:
            found.wait_for(name)
        server = {**found.base["server"], "auth": {"keys": keys()}, "cors_origins": ["https://chat.example"]}
        found.write(models, server=server)
        until(lambda: found.request("GET", "/models").status == 401, "keys are asked for")
        yield found


def ask(daemon: Daemon, method: str, path: str, key: str = "", body: Any = None, **headers: str) -> Reply:
    shown = {"Authorization": f"Bearer {key}"} if key else {}
    return daemon.request(method, path, body, {**shown, **headers})


def code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


def test_without_a_key_there_is_health_and_no_more_of_it_than_a_word(daemon: Daemon) -> None:
    assert ask(daemon, "GET", "/health").json() == {"status": "ok"}
    assert ask(daemon, "GET", "/health", READER).json()["version"]
    for method, path in (("GET", "/models"), ("GET", "/config"), ("POST", "/reload"), ("POST", CHAT), ("GET", "/v1/models")):
        assert code(ask(daemon, method, path, body=chat() if method == "POST" else None)) == (401, "api_key_required")


def test_a_wrong_key_is_told_apart_from_none(daemon: Daemon) -> None:
    for wrong in ("x", USER[:-1], USER + "x", "' OR 1=1 --", "\u00e9".encode().decode("latin-1")):
        assert code(ask(daemon, "POST", CHAT, wrong, chat())) == (401, "invalid_api_key")
    two = {"Authorization": f"Bearer {USER}", "X-Api-Key": ADMIN}
    assert code(daemon.request("POST", CHAT, chat(), two)) == (401, "invalid_api_key")


def test_both_ways_to_show_it(daemon: Daemon) -> None:
    assert ask(daemon, "POST", CHAT, USER, chat()).status == 200
    assert daemon.request("POST", CHAT, chat(), {"X-Api-Key": USER}).status == 200
    assert daemon.request("POST", CHAT, chat(), {"Authorization": f"bearer {USER}"}).status == 200


@pytest.mark.parametrize("key", [USER, READER, ADMIN], ids=["inference", "read", "admin"])
def test_what_each_scope_opens(daemon: Daemon, key: str) -> None:
    opened = {USER: {"inference"}, READER: {"read"}, ADMIN: {"inference", "read", "admin"}}[key]
    calls = {
        "inference": [("POST", CHAT, chat()), ("GET", "/v1/models", None), ("POST", "/upstream/a/tokenize", {"content": "x"})],
        "read": [("GET", "/models", None), ("GET", "/vram/status", None), ("GET", "/metrics", None), ("GET", "/backends", None)],
        "admin": [("POST", "/reload", None), ("GET", "/config", None), ("GET", "/upstream/a/slots", None)],
    }
    pull = ask(daemon, "POST", "/api/pull", key, {"model": "llama3"})  # writes to the disk, if it is let
    assert pull.status == (400 if "admin" in opened else 403)
    for scope, requests in calls.items():
        for method, path, body in requests:
            reply = ask(daemon, method, path, key, body)
            if scope in opened:
                assert reply.status == 200, (path, reply)
            else:
                assert code(reply) == (403, "scope_missing"), path


def test_models_of_a_key(daemon: Daemon) -> None:
    assert ask(daemon, "POST", CHAT, USER, chat("nickname")).status == 200
    assert code(ask(daemon, "POST", CHAT, USER, chat("c"))) == (403, "model_not_allowed")
    assert [entry["id"] for entry in ask(daemon, "GET", "/v1/models", USER).json()["data"]] == ["a", "b"]
    assert len(ask(daemon, "GET", "/v1/models", ADMIN).json()["data"]) == 3


def test_limits_of_a_key(daemon: Daemon) -> None:
    answers = [ask(daemon, "POST", CHAT, FEW, chat()) for _ in range(3)]
    assert [reply.status for reply in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "key_requests_limit"
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    assert ask(daemon, "POST", CHAT, USER, chat()).status == 200


def test_pages_of_other_sites(daemon: Daemon) -> None:
    friend, stranger = {"Origin": "https://chat.example"}, {"Origin": "https://evil.example"}
    let_in = ask(daemon, "POST", CHAT, USER, chat(), **friend)
    assert (let_in.status, let_in.headers["Access-Control-Allow-Origin"]) == (200, "https://chat.example")
    assert code(ask(daemon, "POST", CHAT, USER, chat(), **stranger)) == (403, "cross_site")
    assert "Access-Control-Allow-Origin" not in ask(daemon, "GET", "/v1/models", USER, **stranger).headers
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert daemon.request("OPTIONS", CHAT, None, {**friend, **asked}).status == 204
    refused = daemon.request("OPTIONS", CHAT, None, {**stranger, **asked})
    assert refused.status >= 400
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_no_request_reaches_a_command_line(daemon: Daemon) -> None:
    """Whatever a body or a query says: the model's server runs on as the config has it."""
    (before,) = ask(daemon, "GET", "/models/a", ADMIN).json()["offloadd"]["instances"]
    argv = Path(f"/proc/{before['pid']}/cmdline").read_bytes()
    evil = {
        "args": ["--log-file", "/tmp/x"],
        "command": ["sh"],
        "env": {"X": "1"},
        "api_base": "http://evil.example",
        "n_gpu_layers": 1,
    }
    assert ask(daemon, "POST", CHAT, USER, {**chat(), **evil}).status == 200
    for path in ("/models/a/load?wait=1", "/reload"):
        ask(daemon, "POST", path, ADMIN, evil)
    (after,) = ask(daemon, "GET", "/models/a", ADMIN).json()["offloadd"]["instances"]
    assert after["pid"] == before["pid"]
    assert Path(f"/proc/{after['pid']}/cmdline").read_bytes() == argv


def test_what_was_changed_by_whom_is_in_the_log(daemon: Daemon) -> None:
    ask(daemon, "POST", "/reload", ADMIN)
    assert "POST /reload by ops" in daemon.log


def test_no_secret_comes_out(daemon: Daemon) -> None:
    paths = ("/health", "/config", "/models", "/backends", "/metrics", "/nothing")
    said = "".join(ask(daemon, "GET", path, ADMIN).body.decode() for path in paths) + daemon.log
    assert not [secret for secret in SECRETS if secret in said]
    for name in "abc":
        pid = ask(daemon, "GET", f"/models/{name}", ADMIN).json()["offloadd"]["instances"][0]["pid"]
        for what in ("cmdline", "environ"):
            held = Path(f"/proc/{pid}/{what}").read_bytes().decode()
            assert not [secret for secret in SECRETS if secret in held]


def test_a_key_is_changed_under_a_running_stream(daemon: Daemon) -> None:
    with contextlib.closing(daemon.connect()) as connection:
        body = json.dumps({**chat(tokens=300), "stream": True})
        connection.request("POST", CHAT, body, {"Authorization": f"Bearer {USER}"})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        rotated = [{**key, "key": "${env:ROTATED_KEY}"} if key["name"] == "user" else key for key in keys()]
        server = {**daemon.base["server"], "auth": {"keys": rotated}}
        daemon.write({"a": model(), "b": model(aliases=["nickname"]), "c": model()}, server=server)
        ask(daemon, "POST", "/reload", ADMIN)
        assert code(ask(daemon, "POST", CHAT, USER, chat())) == (401, "invalid_api_key")
        assert ask(daemon, "POST", CHAT, ROTATED, chat()).status == 200
        assert b"[DONE]" in response.read()


def test_the_daemons_own_user_needs_no_key_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    auth = {"keys": [{"name": "ops", "key": ADMIN, "scopes": ["admin"]}]}
    server = {"auth": auth, "listen": [f"{HOST}:{free_port()}", f"unix:{path}"]}
    with running(tmp_path, {"a": model(run="never")}, server=server) as daemon:
        assert daemon.request("GET", "/models").status == 401
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_needs_a_key_on_a_unix_socket(tmp_path: Path) -> None:
    """Also one that may open the socket, because its mode was changed: the kernel says who it is."""
    auth = {"keys": [{"name": "ops", "key": ADMIN, "scopes": ["admin"]}]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "api.sock"
        server = {"auth": auth, "listen": [f"{HOST}:{free_port()}", f"unix:{path}"]}
        with running(tmp_path, {"a": model(run="never")}, server=server):
            assert _asked_as(NOBODY, path) == b"PermissionError"
            path.chmod(0o666)
            assert _asked_as(NOBODY, path).startswith(b"HTTP/1.1 401")
            assert _asked_as(NOBODY, path, f"Authorization: Bearer {ADMIN}\r\n").startswith(b"HTTP/1.1 200")


def _asked_as(user: int, path: Path, headers: str = "") -> bytes:
    """How the answer to such a user begins, or what kept it from asking. A child, for there is no way back from being another."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(f"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode())
                os.write(writing, client.recv(64))
        except BaseException as error:
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read()


def test_tokens_are_charged_to_whose_they_are(tmp_path: Path) -> None:
    """Also where one key's request has opened the connection to the engine on which another's answers come."""
    keys = [
        {"name": "metered", "key": "${env:FEW_KEY}", "limits": {"tokens_per_minute": 60}},
        {"name": "free", "key": "${env:USER_KEY}"},
        {"name": "ops", "key": "${env:ADMIN_KEY}", "scopes": ["admin"]},
    ]
    models = {"a": served_by("vllm", run="always")}  # whose connections are used again
    env = {"FEW_KEY": FEW, "USER_KEY": USER, "ADMIN_KEY": ADMIN}
    with daemon_of(tmp_path, models, env=env) as daemon:
        daemon.wait_for("a")
        daemon.write(models, server={**daemon.base["server"], "auth": {"keys": keys}})
        until(lambda: daemon.request("GET", "/models").status == 401, "keys are asked for")
        first = ask(daemon, "POST", CHAT, FEW, chat())
        assert first.status == 200
        tokens = first.json()["usage"]["total_tokens"]
        assert 2 <= tokens <= 25  # so that two of its own are within its limit, and thirty of another's would not be
        for _ in range(30):
            assert ask(daemon, "POST", CHAT, USER, chat()).status == 200
        assert ask(daemon, "GET", "/models", ADMIN).status == 200  # all that was served is accounted for by now
        assert ask(daemon, "POST", CHAT, FEW, chat()).status == 200
