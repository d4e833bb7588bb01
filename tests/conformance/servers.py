"""Starts servers for the conformance suite: the real llama-server where there is one, and the stand-in."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offloadd import demo
from offloadd.backends.llamacpp import BACKEND, LlamaCppOptions
from offloadd.errors import PermanentError
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Endpoint, ExitStatus, ModelFacts, Placement, ProbeReply

STANDIN = Path(__file__).parent.parent / "standin" / "llama_server.py"
HOST = "127.0.0.1"
READY_WITHIN_S = 90.0
LLAMACPP = BackendName("llamacpp")
SPEC_OF_NONE = ModelSpec(name=ModelName("none"), source="none", backends=(LLAMACPP,))
"""For servers that no adapter started."""


_PORTS = itertools.count(10_000 + os.getpid() * 97 % 15_000)
"""Below those that the kernel gives to whoever asks for any: what a test is to listen on is not taken by a neighbour meanwhile."""


def free_port() -> int:
    """A port that was free a moment ago, and that nobody is given who does not ask for it by number."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise AssertionError("there is no free port")


def until(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """Poll until `condition` gives something true, and return that; fail when it takes too long."""
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.002)


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What the `data:` lines of a stream hold; `[DONE]` stays text."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass(slots=True)
class Server:
    """One running process, with its log in a file."""

    process: subprocess.Popen[bytes]
    port: int
    spec: ModelSpec
    log_path: Path
    clients: list[http.client.HTTPConnection] = field(default_factory=list)
    """Connections that stay open as long as the server lives."""

    @property
    def log(self) -> list[str]:
        return self.log_path.read_text(errors="replace").splitlines()

    def connect(self, timeout: float = 90) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        connection.connect()
        return connection

    def request(self, method: str, path: str, body: Any = None) -> Reply:
        """Ask and read the whole answer; `body` is sent as it is when it is bytes, else as JSON."""
        with contextlib.closing(self.connect()) as connection:
            _send(connection, method, path, body)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> Reply:
        return self.request("POST", path, body)

    def begin(self, path: str, body: Any) -> http.client.HTTPConnection:
        """Send a request and leave the answer unread; close the connection to walk away."""
        connection = self.connect()
        _send(connection, "POST", path, body)
        return connection

    def probe(self, path: str) -> ProbeReply:
        """What offloadd's prober would bring back."""
        try:
            reply = self.get(path)
        except OSError as problem:
            return ProbeReply(status=None, error=str(problem))
        return ProbeReply(status=reply.status, body=reply.body)

    @property
    def listening(self) -> bool:
        with contextlib.suppress(OSError), contextlib.closing(self.connect(1)):
            return True
        return False

    def wait_listening(self) -> None:
        until(lambda: self.listening or self.process.poll() is not None, "the port opens", READY_WITHIN_S)

    def wait_ready(self) -> None:
        def ready() -> bool:
            code = self.process.poll()
            assert code is None, f"ended with {code} while starting:\n" + "\n".join(self.log[-20:])
            return self.probe("/health").status == 200

        until(ready, "/health says 200", READY_WITHIN_S)

    def busy_slots(self) -> int:
        return sum(slot["is_processing"] for slot in self.get("/slots").json())

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").body.decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"llamacpp:{name} "))

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit(self, within_s: float = 15) -> ExitStatus:
        code = self.process.wait(within_s)
        return ExitStatus(signal=-code) if code < 0 else ExitStatus(code=code)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for client in self.clients:
            client.close()


def _send(connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> None:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})


@dataclass(frozen=True, slots=True)
class Subject:
    """A program under test: how to run it, what it loads, and its parts of the environment."""

    name: str
    command: tuple[str, ...]
    model: Path
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    slow_load_env: Mapping[str, str] = field(default_factory=dict)

    def spec(self, **changes: Any) -> ModelSpec:
        spec = ModelSpec(name=ModelName("tiny"), source=str(self.model), backends=(LLAMACPP,), context=2048, parallel=2)
        return replace(spec, **changes)

    @contextlib.contextmanager
    def start(
        self,
        *,
        spec: ModelSpec | None = None,
        model: Path | None = None,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        """Run it with the command line that offloadd's adapter writes; killed at the end if it still lives."""
        spec = spec or self.spec()
        port = port or free_port()
        engine = Engine(name=LLAMACPP, adapter="llamacpp", command=self.command)
        facts = ModelFacts(path=str(model or self.model))
        launch = BACKEND.launch(engine, spec, facts, Placement(reserved={}), Endpoint(host=HOST, port=port))
        process = self._spawn(launch.argv, {**launch.env, **self.env, **(env or {})}, port)
        server = Server(process, port, spec, self.folder / f"{port}.log")
        try:
            yield server
        finally:
            server.kill()

    def start_slowly(self) -> contextlib.AbstractContextManager[Server]:
        """Run it so that loading lasts long enough to look at it: the real one takes its time over a large context."""
        return self.start(spec=self.spec(context=8192), env=self.slow_load_env)

    def _spawn(self, argv: Sequence[str], env: Mapping[str, str], port: int) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with (self.folder / f"{port}.log").open("wb") as log:
            return subprocess.Popen(argv, env={**kept, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)


def embedding_options() -> Mapping[str, LlamaCppOptions]:
    return {"llamacpp": LlamaCppOptions(embeddings=True, pooling="mean")}


def tiny_gguf() -> bytes:
    """A GGUF file of one tensor and one line of metadata: enough for the stand-in, not for llama-server."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<Iqq", 3, 1, 1)
    metadata = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    tensor = text("token_embd.weight") + struct.pack("<IqIQ", 1, 4096, 0, 0)
    head = header + metadata + tensor
    return head + bytes(-len(head) % 32) + bytes(4 * 4096)


def standin(folder: Path) -> Subject:
    """The stand-in, with a file that is a model as far as it looks."""
    model = folder / "model.gguf"
    model.write_bytes(tiny_gguf())
    env = {"STANDIN_TOKEN_S": "0.005"}
    return Subject("stand-in", (sys.executable, str(STANDIN)), model, folder, env, {"STANDIN_LOAD_S": "0.5"})


def real(folder: Path) -> Subject | str:
    """The real llama-server with a real model, or why there is none."""
    try:
        command, env = demo.find_server()
        model = demo.find_model()
    except PermanentError as missing:
        return f"{missing.message}: {missing.hint}"
    return Subject("llama-server", (str(command),), model, folder, env)
