"""Runs the real daemon as a process, asks it over HTTP, edits its config, and looks at what it leaves behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from offloadd.runtime.launchers.cgroups import delegated
from offloadd.runtime.launchers.folders import Folders
from tests.conformance.servers import HOST, STANDIN, Reply, free_port, tiny_gguf, until

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
START_WITHIN_S = 60.0
END_WITHIN_S = 60.0
_BUGS = re.compile(r"Traceback|internal error|reconcile cycle failed|never retrieved|ResourceWarning|this is a bug")
_PATCHED = """\
import importlib, sys
for name, value in {patches!r}.items():
    module, _, constant = name.rpartition(".")
    assert hasattr(importlib.import_module(module), constant), name
    setattr(importlib.import_module(module), constant, value)
from offloadd.cli import main
main()
"""
Settings = Mapping[str, Any]


def model(**changes: Any) -> dict[str, Any]:
    """A model's settings: small, quick to plan, running always; `env` adds knobs of the stand-in."""
    knobs = {"STANDIN_TOKEN_S": "0.005", **changes.pop("env", {})}
    usual = {"source": "model.gguf", "run": "always", "context": 8192, "parallel": 2, "vram": "64MiB"}
    return {**usual, **changes, "env": {name: str(value) for name, value in knobs.items()}}


def chat(name: str = "a", tokens: int = 4, **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": name, "messages": HELLO, "max_tokens": tokens, **more}


class Stream:
    """One answer in events, read as it comes."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._socket = connection.sock
        self.response = connection.getresponse()
        self.status = self.response.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __iter__(self) -> Iterator[Any]:
        """Payloads of `data:` lines as they come; `[DONE]` stays text."""
        while line := self.response.readline():
            if line.startswith(b"data: "):
                payload = line[6:].strip()
                yield "[DONE]" if payload == b"[DONE]" else json.loads(payload)

    def skip(self, count: int) -> None:
        """Read so many events and forget them."""
        for _, _payload in zip(range(count), self, strict=False):
            pass

    def leave(self) -> None:
        """Walk away, read or not."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.response.close()
        self._connection.close()


@dataclass(slots=True)
class Daemon:
    """One running daemon and its files."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    config_path: Path
    log_path: Path
    base: Mapping[str, Any]
    """The config without its models."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=80))

    # --- asking ---

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        connection.connect()
        return connection

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        """Ask and read the whole answer; `body` is sent as it is when it is bytes, else as JSON."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, _encoded(body), {**(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def get(self, path: str) -> Any:
        """What a path answers, which must be 200."""
        reply = self.request("GET", path)
        assert reply.status == 200, reply
        return reply.json()

    def post(self, path: str, body: Any) -> Reply:
        return self.request("POST", path, body)

    def chat(self, name: str = "a", tokens: int = 4, **more: Any) -> Reply:
        return self.post(CHAT, chat(name, tokens, **more))

    def chat_soon(self, name: str = "a", tokens: int = 4, **more: Any) -> Future[Reply]:
        """The same, in a thread."""
        return self.threads.submit(self.chat, name, tokens, **more)

    def begin(self, path: str, body: Any) -> http.client.HTTPConnection:
        """Send a request and leave the answer unread; close the connection to walk away."""
        connection = self.connect()
        connection.request("POST", path, _encoded(body))
        return connection

    def stream(self, name: str = "a", tokens: int = 200, path: str = CHAT, **more: Any) -> Stream:
        """An answer in events, up to its headers."""
        return Stream(self.begin(path, {**chat(name, tokens, **more), "stream": True}))

    def events(self, name: str = "a", tokens: int = 200, path: str = CHAT, **more: Any) -> list[Any]:
        """All events of one stream."""
        with self.stream(name, tokens, path, **more) as stream:
            return list(stream)

    # --- looking ---

    def look(self, name: str = "a") -> Any:
        """What /models/{name} says about the model."""
        return self.get(f"/models/{name}")["offloadd"]

    def state(self, name: str = "a") -> str:
        return str(self.look(name)["state"])

    def wait_for(self, name: str = "a", state: str = "ready", within_s: float = 60) -> Any:
        """What /models/{name} says once the model is in `state`."""
        return until(lambda: found if (found := self.look(name))["state"] == state else None, f"{name} is {state}", within_s)

    def pids(self, name: str = "a") -> list[int]:
        return [instance["pid"] for instance in self.look(name)["instances"] if instance["pid"]]

    def pid(self, name: str = "a") -> int:
        """The one process of a model that is ready."""
        (found,) = (i["pid"] for i in self.wait_for(name)["instances"] if i["state"] == "ready")
        return int(found)

    def names(self) -> list[str]:
        return [entry["id"] for entry in self.get("/v1/models")["data"]]

    def load(self, name: str = "a") -> int:
        """Requests that the model's instances hold."""
        return sum(instance["load"] for instance in self.look(name)["instances"])

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def data_dir(self) -> Path:
        return Path(self.base["storage"]["data_dir"])

    def launches(self, name: str = "a") -> int:
        """How often the model was started, by the logs that its instances left."""
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.data_dir.glob(f"logs/{name}-*.log")]
        return max(numbers, default=0)

    def leftovers(self) -> list[int]:
        return marked(self.data_dir)

    # --- changing ---

    def write(self, models: Mapping[str, Settings], **sections: Any) -> None:
        """Replace the config's file by a new one, in one step."""
        replace_file(self.config_path, json.dumps({**self.base, **sections, "models": models}))

    def apply(self, models: Mapping[str, Settings], **sections: Any) -> Any:
        """Replace the config and have it taken up now; the answer of POST /reload."""
        self.write(models, **sections)
        reply = self.post("/reload", None)
        assert reply.status == 200, reply
        return reply.json()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def hup(self) -> None:
        self.signal(signal.SIGHUP)

    def term(self) -> None:
        self.signal(signal.SIGTERM)

    def exit(self, within_s: float = END_WITHIN_S) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(within_s)

    def close(self) -> None:
        """End it, and check that it ended well: nothing left of it, and nothing in its log that is a bug."""
        if self.process.poll() is None:
            self.term()
            until(lambda: "stopping: no new requests" in self.log or self.process.poll() is not None, "it stops")
            if self.process.poll() is None:
                self.term()  # hurries it; one that comes when all is done must change nothing
            assert self.exit() == 0
        assert not self.leftovers()
        assert not _BUGS.search(self.log)

    def discard(self) -> None:
        """Leave nothing behind, whatever has happened."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.leftovers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _remove_groups(self.data_dir)
        _remove_folders(self.data_dir)
        self.threads.shutdown(cancel_futures=True)


def marked(data_dir: Path) -> list[int]:
    """Processes that belong to the daemon of this data folder, by the variable that it marks them with."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("OFFLOADD_DATA_DIR") == str(data_dir):
                found.append(process.pid)
    return found


def _remove_groups(data_dir: Path) -> None:
    """Control groups of a daemon that had no time to take them away."""
    groups = delegated(data_dir)
    if groups is not None:
        groups.sweep(frozenset())
        groups.remove()


def _remove_folders(data_dir: Path) -> None:
    """Folders of its launches, likewise: they may lie in /tmp."""
    folders = Folders(data_dir)
    folders.sweep(frozenset())
    folders.close()


def replace_file(path: Path, text: str) -> None:
    """As an editor or `install` does it: a new file beside the old, renamed over it."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


def alive(pid: int) -> bool:
    """Whether a process runs, zombies aside."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marks(path: Path) -> list[str]:
    """The stand-in's mark file: what happened, without the pids."""
    return [line.split(" ", 1)[1] for line in path.read_text().splitlines()] if path.exists() else []


def elapsed(action: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def settings(folder: Path, port: int, llamacpp: Settings | None = None) -> dict[str, Any]:
    """A config without models, for the stand-in unless `llamacpp` names another server."""
    return {
        "server": {"listen": [f"{HOST}:{port}"]},
        "storage": {"data_dir": str(folder / "data"), "models_path": [str(folder)]},
        "backends": {"llamacpp": llamacpp or {"command": [sys.executable, str(STANDIN)]}},
    }


def launch(
    folder: Path,
    models: Mapping[str, Settings],
    *,
    llamacpp: Settings | None = None,
    patches: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
    config_path: Path | None = None,
    **sections: Any,
) -> Daemon:
    """Start a daemon in `folder` and wait for nothing. `patches` sets constants of offloadd, by their dotted names."""
    gguf = folder / "model.gguf"
    if not gguf.exists():
        gguf.write_bytes(tiny_gguf())
    port = free_port()
    base = {**settings(folder, port, llamacpp), **sections}
    path = config_path or folder / "offloadd.json"
    if not path.exists():
        path.write_text(json.dumps({**base, "models": models}))
    return again(folder, path, base, patches=patches, env=env)


def again(
    folder: Path,
    config_path: Path,
    base: Mapping[str, Any],
    *,
    patches: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
) -> Daemon:
    """Start a daemon for a config that is there."""
    log_path = folder / f"daemon-{len(list(folder.glob('daemon-*.log')))}.log"
    argv = command(config_path, patches)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            argv, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    port = int(base["server"]["listen"][0].rpartition(":")[2])
    return Daemon(process, port, folder, config_path, log_path, base)


def command(config_path: Path, patches: Mapping[str, float] | None = None) -> list[str]:
    """What starts a daemon."""
    start: Sequence[str] = ("-c", _PATCHED.format(patches=patches)) if patches else ("-m", "offloadd")
    return [sys.executable, "-W", "always::ResourceWarning", *start, "run", "-c", str(config_path)]


def wait_healthy(daemon: Daemon) -> Daemon:
    """Until it answers /health."""

    def healthy() -> bool:
        assert daemon.process.poll() is None, f"it ended with {daemon.process.returncode}:\n{daemon.log}"
        try:
            return daemon.request("GET", "/health").status == 200
        except OSError:
            return False

    until(healthy, "/health answers", START_WITHIN_S)
    return daemon


@contextlib.contextmanager
def supervised(daemon: Daemon) -> Iterator[Daemon]:
    """Have it healthy, and check at the end that it ends well. Its log is printed, for pytest to show when the test fails."""
    try:
        yield wait_healthy(daemon)
        daemon.close()
    finally:
        daemon.discard()
        print(f"--- {daemon.log_path}\n{daemon.log}")


def running(folder: Path, models: Mapping[str, Settings], **options: Any) -> contextlib.AbstractContextManager[Daemon]:
    """A daemon for these models, from start to a checked end; options as `launch` takes them."""
    return supervised(launch(folder, models, **options))


def _encoded(body: Any) -> bytes | None:
    return body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
