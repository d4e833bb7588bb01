"""The API over HTTP: shapes, errors, headers, and what it must not tell or let in."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import HOST, Reply, until
from tests.integration.daemon import CHAT, HELLO, Daemon, chat, model, running

CANARY = "canary-5e1f9c"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    rules = {"set": {"max_tokens": 3}, "remove": ["stop"]}
    models = {
        "a": model(aliases=["default"], env={"STANDIN_NOTHING": "${env:CANARY}"}),
        "ruled": model(request=rules),
        "words": model(llamacpp={"embeddings": True}),
        "off": model(run="never"),
    }
    folder = tmp_path_factory.mktemp("http")
    with running(folder, models, env={"CANARY": CANARY}) as running_daemon:
        for name in ("a", "ruled", "words"):
            running_daemon.wait_for(name)
        yield running_daemon


def error_of(reply: Reply, status: int) -> dict[str, Any]:
    """The error object, once the reply is checked to have OpenAI's shape."""
    assert reply.status == status, reply
    assert reply.headers["Content-Type"].startswith("application/json")
    assert reply.headers["X-Request-Id"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["message"]
    return dict(error)


# --- looking ----------------------------------------------------------------------------------------------------------------------


def test_health(daemon: Daemon) -> None:
    found = daemon.get("/health")
    assert (found["status"], found["problems"]) == ("ok", [])
    assert found["version"]
    assert found["uptime_s"] > 0
    assert found["config"]["last_attempt"]["ok"]


def test_models(daemon: Daemon) -> None:
    found = daemon.get("/models")
    assert found["object"] == "list"
    assert {entry["id"]: entry["offloadd"]["state"] for entry in found["data"]} == {
        "a": "ready",
        "ruled": "ready",
        "words": "ready",
        "off": "off",
    }
    one = daemon.get("/models/default")
    assert one["id"] == "a"
    own = one["offloadd"]
    assert own["vram"]["estimated"] == 64 * 2**20
    assert own["fits"] == "now"
    assert own["backends"][0] == {"name": "llamacpp", "available": True, "fits": "now", "reason": "", "hint": ""}
    assert own["size_bytes"] == (daemon.folder / "model.gguf").stat().st_size


def test_openai_models(daemon: Daemon) -> None:
    found = daemon.get("/v1/models")
    assert [entry["id"] for entry in found["data"]] == ["a", "ruled", "words", "off"]
    one = daemon.get("/v1/models/default")
    assert one == found["data"][0]
    assert set(one) == {"id", "object", "created", "owned_by"}


def test_backends(daemon: Daemon) -> None:
    found = {entry["name"]: entry for entry in daemon.get("/backends")["backends"]}
    llamacpp = found["llamacpp"]
    assert llamacpp["available"]
    assert "build 1" in llamacpp["version"]
    assert {instance["model"] for instance in llamacpp["instances"]} == {"a", "ruled", "words"}
    assert (llamacpp["load"], llamacpp["queue"]) == (0, 0)
    assert daemon.get("/backends/llamacpp").keys() == llamacpp.keys()
    assert error_of(daemon.request("GET", "/backends/nothing"), 404)["code"] == "backend_not_found"


def test_vram_status(daemon: Daemon) -> None:
    found = daemon.get("/vram/status")
    (device,) = found["devices"]
    assert device["kind"] == "host"
    assert device["reserved_bytes"] == 3 * 64 * 2**20
    assert device["total_bytes"] == device["used_bytes"] + device["free_bytes"]
    assert device["limit_bytes"] <= device["total_bytes"]
    assert {share["model"]: share["reserved_bytes"] for share in device["instances"]} == dict.fromkeys(
        ("a", "ruled", "words"), 64 * 2**20
    )
    assert found["totals"] == {key: device[key] for key in found["totals"]}


def test_memory_is_measured(daemon: Daemon) -> None:
    def measured() -> list[int | None]:
        (device,) = daemon.get("/vram/status")["devices"]
        return [share["measured_bytes"] for share in device["instances"]]

    until(lambda: all(measured()), "every instance is measured", 5)
    assert daemon.look("a")["vram"]["measured"]


def test_config(daemon: Daemon) -> None:
    found = daemon.get("/config")
    assert found["generation"] == daemon.get("/health")["generation"]
    assert found["settings"]["models"]["a"]["env"]["STANDIN_NOTHING"] == "${env:CANARY}"


def test_secrets_are_nowhere(daemon: Daemon) -> None:
    daemon.chat("a")
    paths = ("/health", "/models", "/models/a", "/backends", "/backends/llamacpp", "/vram/status", "/config", "/v1/models")
    for path in paths:
        assert CANARY not in daemon.request("GET", path).body.decode()
    assert CANARY not in daemon.post("/reload", None).body.decode()
    assert CANARY not in daemon.log
    argv = Path(f"/proc/{daemon.pid('a')}/cmdline").read_bytes().decode()
    assert CANARY not in argv


# --- refusing ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/models", "/nothing", "/v1/models"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "127.0.0.1.evil.example", ""])
def test_another_name_for_this_machine_is_refused(daemon: Daemon, path: str, host: str) -> None:
    assert error_of(daemon.request("GET", path, headers={"Host": host}), 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:80", "127.0.0.2", "[::1]:9000", "LOCALHOST"])
def test_loopback_names_are_answered(daemon: Daemon, host: str) -> None:
    assert daemon.request("GET", "/health", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", ["a/b", "a?b", "user@localhost"])
def test_a_host_that_is_none_is_refused(daemon: Daemon, host: str) -> None:
    assert daemon.request("GET", "/health", headers={"Host": host}).status == 400


def test_two_hosts_are_refused(daemon: Daemon) -> None:
    connection = daemon.connect()
    connection.putrequest("GET", "/health", skip_host=True)
    connection.putheader("Host", "localhost")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize("header", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}])
@pytest.mark.parametrize("path", ["/reload", CHAT, "/inference", "/upstream/a/props"])
def test_another_sites_page_can_change_nothing(daemon: Daemon, path: str, header: dict[str, str]) -> None:
    assert error_of(daemon.request("POST", path, chat(), header), 403)["code"] == "cross_site"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/inference"])
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"x":' * 5000, "invalid_json"),
        (b"[]", "invalid_body"),
        (b'"text"', "invalid_body"),
        (b'{"model": 7}', "invalid_body"),
        (b'{"model": "a", "stream": "yes"}', "invalid_body"),
        (b'{"messages": []}', "model_required"),
    ],
)
def test_bad_bodies(daemon: Daemon, path: str, body: bytes, code: str) -> None:
    assert error_of(daemon.post(path, body), 400)["code"] == code


def test_a_body_that_is_too_large_is_refused_by_its_length(daemon: Daemon) -> None:
    connection = daemon.connect(5)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", str(65 * 2**20))
    connection.endheaders()
    response = connection.getresponse()
    reply = Reply(response.status, dict(response.getheaders()), response.read())
    connection.close()
    assert error_of(reply, 413)["code"] == "body_too_large"


def test_a_body_that_is_too_large_and_does_not_say_so(daemon: Daemon) -> None:
    connection = daemon.connect()
    connection.putrequest("POST", CHAT)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    try:
        for _ in range(66):
            connection.send(chunk)
    except OSError:
        pass  # it has been refused and closed meanwhile
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert daemon.get("/health")["status"] == "ok"


def test_unknown_paths_and_methods(daemon: Daemon) -> None:
    assert error_of(daemon.request("GET", "/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(daemon.request("GET", "/models/nothing"), 404)["code"] == "model_not_found"
    reply = daemon.request("GET", CHAT)
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert "POST" in reply.headers["Allow"]
    assert daemon.request("OPTIONS", "/models/a/load").headers["Allow"] == "POST"


def test_an_engine_that_the_model_does_not_have(daemon: Daemon) -> None:
    error = error_of(daemon.post(CHAT, {**chat("a"), "backend": "vllm"}), 400)
    assert (error["code"], error["param"]) == ("backend_not_configured", "backend")


def test_the_engines_own_refusal_is_passed_on(daemon: Daemon) -> None:
    reply = daemon.chat("a", temperature="hot")
    assert reply.status == 400
    assert "temperature" in reply.json()["error"]["message"]
    assert reply.headers["X-Offloadd-Instance"] == "a-1"
    with daemon.stream("a", temperature="hot") as stream:
        assert stream.status == 400
        assert "temperature" in json.loads(stream.response.read())["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused_without_a_fuss(daemon: Daemon, raw: bytes) -> None:
    connection = daemon.connect(5)
    connection.sock.sendall(raw)
    answer = connection.sock.recv(4096)
    connection.close()
    assert answer.split(None, 2)[1] in (b"400", b"403"), answer


# --- headers ----------------------------------------------------------------------------------------------------------------------


def test_request_ids(daemon: Daemon) -> None:
    assert daemon.request("GET", "/health", headers={"X-Request-Id": "mine-7"}).headers["X-Request-Id"] == "mine-7"
    assert daemon.request("POST", CHAT, chat(), {"X-Request-Id": "mine-8"}).headers["X-Request-Id"] == "mine-8"
    made = {daemon.request("GET", "/health", headers={"X-Request-Id": "not fit"}).headers["X-Request-Id"] for _ in range(2)}
    assert len(made) == 2
    assert "not fit" not in made


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/inference"])
def test_answers_say_where_they_come_from(daemon: Daemon, path: str, stream: bool) -> None:
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": HELLO}
    reply = daemon.post(path, {"model": "a", "max_tokens": 2, "stream": stream, **asked})
    assert reply.status == 200
    assert reply.headers["X-Offloadd-Instance"] == "a-1"
    assert reply.headers["X-Offloadd-Backend"] == "llamacpp"
    assert "a-1 is ready" in reply.headers["X-Offloadd-Reason"]
    assert "llama.cpp" not in reply.headers.get("Server", "")
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_one_connection_serves_many_requests(daemon: Daemon) -> None:
    connection = http.client.HTTPConnection(HOST, daemon.port, timeout=10)
    for number in range(5):
        connection.request("POST", CHAT, json.dumps(chat("a", 2, stream=number % 2 == 0)))
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        assert connection.sock is not None
    connection.close()


def test_a_model_without_a_name_is_the_only_one(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as alone:
        assert alone.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status == 200
        assert alone.post("/inference", {"prompt": "hello", "max_tokens": 1}).json()["model"] == "a"


# --- /inference -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"prompt": "hello"}, {"messages": HELLO}])
def test_inference(daemon: Daemon, given: dict[str, Any]) -> None:
    reply = daemon.post("/inference", {"model": "default", "max_tokens": 3, **given})
    assert reply.status == 200
    answer = reply.json()
    assert set(answer) == {"model", "backend", "instance", "text", "finish_reason", "usage", "timings"}
    assert (answer["model"], answer["backend"], answer["instance"]) == ("a", "llamacpp", "a-1")
    assert (answer["text"], answer["finish_reason"]) == ("the night was", "length")
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["timings"]["predicted_n"] == 3


@pytest.mark.parametrize("given", [{"prompt": "hello"}, {"messages": HELLO}])
def test_inference_as_a_stream(daemon: Daemon, given: dict[str, Any]) -> None:
    reply = daemon.post("/inference", {"model": "a", "max_tokens": 3, "stream": True, **given})
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *pieces, last, done = reply.events
    assert "".join(piece["text"] for piece in pieces) == "the night was"
    assert (last["instance"], last["finish_reason"], last["usage"]["completion_tokens"]) == ("a-1", "length", 3)
    assert done == "[DONE]"


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": HELLO}, {"prompt": 7}, {"messages": "x"}, {"prompt": None, "messages": None}]
)
def test_inference_refuses_what_it_cannot_read(daemon: Daemon, body: dict[str, Any]) -> None:
    assert error_of(daemon.post("/inference", {"model": "a", **body}), 400)["code"] == "invalid_body"


@pytest.mark.parametrize("stream", [True, False])
def test_inference_passes_the_engines_refusal_on(daemon: Daemon, stream: bool) -> None:
    reply = daemon.post("/inference", {"model": "a", "prompt": "x", "temperature": "hot", "stream": stream})
    assert reply.status == 400
    assert "temperature" in reply.json()["error"]["message"]


def test_request_rules(daemon: Daemon) -> None:
    assert daemon.chat("ruled", 100, stop=["night"]).json()["usage"]["completion_tokens"] == 3
    assert daemon.post("/inference", {"model": "ruled", "prompt": "x", "max_tokens": 50}).json()["usage"]["completion_tokens"] == 3


# --- the rest ---------------------------------------------------------------------------------------------------------------------


def test_completions_and_embeddings(daemon: Daemon) -> None:
    answer = daemon.post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 2}).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "the night")
    found = daemon.post("/v1/embeddings", {"model": "words", "input": ["one", "two"]}).json()
    assert [entry["index"] for entry in found["data"]] == [0, 1]


def test_upstream(daemon: Daemon) -> None:
    assert daemon.get("/upstream/a/props")["total_slots"] == 2
    assert daemon.get("/upstream/default/slots?fail_on_no_slot=0")[0]["id"] == 0
    reply = daemon.post("/upstream/a/tokenize", {"content": "one two", "with_pieces": True})
    assert [token["piece"] for token in reply.json()["tokens"]] == ["one", " two"]
    assert reply.headers["X-Offloadd-Instance"] == "a-1"
    assert daemon.request("GET", "/upstream/a/nothing").status == 404
    assert error_of(daemon.request("GET", "/upstream/nothing/props"), 404)["code"] == "model_not_found"
    assert error_of(daemon.request("GET", "/upstream/off/props"), 409)["code"] == "model_disabled"
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert daemon.request("GET", "/upstream/a/socket", headers=upgrade).status == 404  # in llama-server's own words


def test_looking_takes_no_slot(daemon: Daemon) -> None:
    with daemon.stream("a", 500) as one, daemon.stream("a", 500) as other:
        one.skip(1)
        other.skip(1)
        assert sum(slot["is_processing"] for slot in daemon.get("/upstream/a/slots")) == 2


def test_no_engine_is_made_to_fetch(daemon: Daemon) -> None:
    """Neither through a dialect nor by path, however large the body is."""
    picture = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    padding = {"type": "text", "text": "x" * 100_000}
    for parts in ([picture], [padding, picture]):
        asked = {**chat(), "messages": [{"role": "user", "content": parts}]}
        for path in (CHAT, "/inference", "/upstream/a/v1/chat/completions"):
            reply = daemon.request("POST", path, asked, {"Content-Type": "application/json"})
            assert error_of(reply, 400)["code"] == "media_not_allowed", path
