"""The daemon as a service: what its manager hears, and sockets that outlive it. A small manager stands in for systemd."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import HOST, free_port, tiny_gguf, until
from tests.fakes.systemd import ServiceManager
from tests.integration.daemon import CHAT, Daemon, chat, command, model, replace_file, settings, wait_healthy

RESTARTS = int(os.environ.get("OFFLOADD_RESTARTS", "3"))
"""How often the service is restarted under load; 100 is what the project promises, and takes some minutes."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path, watchdog_s=1.5) as found:
        yield found


def begin(
    manager: ServiceManager,
    models: Mapping[str, Any],
    port: int,
    patches: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
) -> Daemon:
    """Start a daemon under the manager, for the config that is there or for these models."""
    folder = manager.folder
    base = settings(folder, port)
    config = folder / "offloadd.json"
    if not config.exists():
        (folder / "model.gguf").write_bytes(tiny_gguf())
        config.write_text(json.dumps({**base, "models": models}))
    log = folder / f"daemon-{len(list(folder.glob('daemon-*.log')))}.log"
    return Daemon(manager.spawn(command(config, patches), log, env), port, folder, config, log, base)


@contextmanager
def under(
    manager: ServiceManager,
    models: Mapping[str, Any],
    patches: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Daemon]:
    daemon = begin(manager, models, free_port(), patches, env)
    try:
        yield daemon
        daemon.close()
    finally:
        daemon.discard()
        print(f"--- {daemon.log_path}\n{daemon.log}")


def test_the_manager_hears_of_the_start_of_models_of_every_reload_and_of_the_end(manager: ServiceManager) -> None:
    with under(manager, {"a": model(), "b": model(run="on-demand")}) as daemon:
        ready = manager.wait_word("READY")
        assert "1 of 2 models ready (a)" not in manager.messages[ready]["STATUS"]  # it is ready when it listens
        assert daemon.request("GET", "/health").status == 200
        loaded = manager.wait_for(lambda m: "STATUS" in m and "1 of 2 models ready (a)" in m["STATUS"], "a is ready")
        assert "; host 64.0 MiB of " in manager.messages[loaded]["STATUS"]
        manager.wait_word("WATCHDOG", "1", since=loaded)

        daemon.hup()
        reloading = manager.wait_word("RELOADING", since=loaded)
        assert int(manager.messages[reloading]["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        again = manager.wait_word("READY", since=reloading)
        assert "refused" not in manager.messages[again]["STATUS"]

        replace_file(daemon.config_path, daemon.config_path.read_text().replace('"context"', '"contxt"', 1))
        refused = manager.wait_for(lambda m: "READY" in m and "refused" in m["STATUS"], "the refusal", since=again)
        first = manager.messages[refused]["STATUS"]
        assert first.startswith(f"config refused: {daemon.config_path}:1:"), first
        assert 'unknown key "contxt"' in first
        manager.wait_for(lambda m: "STATUS" in m and m["STATUS"].startswith("config refused"), "it stays there", since=refused)

        daemon.term()
        stopping = manager.wait_word("STOPPING", since=refused)
        # The grace, the server's own stop_timeout and a margin: longer than systemd would wait by itself.
        assert int(manager.messages[stopping]["EXTEND_TIMEOUT_USEC"]) == 75_000_000
        assert daemon.exit() == 0
        reloads = [word for message in manager.messages for word, _ in message.words if word in ("RELOADING", "READY")]
        assert reloads == ["READY"] + ["RELOADING", "READY"] * (len(reloads) // 2)


def test_a_scheduler_that_does_not_progress_feeds_no_watchdog(manager: ServiceManager) -> None:
    with under(manager, {}, {"offloadd.control.STALLED": -1}) as daemon:
        manager.wait_for(lambda m: "STATUS" in m and "the scheduler does not progress" in m["STATUS"], "that it stands still")
        daemon.hup()
        manager.wait_word("READY", since=manager.wait_word("RELOADING"))
        time.sleep(2 * (manager.watchdog_s or 0))  # the time in which it would have been fed
        assert not any("WATCHDOG" in message for message in manager.messages)
        assert daemon.request("GET", "/health").status == 503


def test_engines_are_told_nothing_of_the_manager_and_the_log_is_json_when_asked_for(manager: ServiceManager) -> None:
    with under(manager, {"a": model()}, env={"OFFLOADD_LOG": "json"}) as daemon:
        wait_healthy(daemon)
        environ = Path(f"/proc/{daemon.pid()}/environ").read_bytes().split(b"\0")
        given = {entry.partition(b"=")[0].decode() for entry in environ}
        assert "OFFLOADD_DATA_DIR" in given
        assert not {name for name in given if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))}
        lines = [json.loads(line) for line in daemon.log.splitlines()]
        assert "a-1" in [line["instance"] for line in lines if line.get("event") == "instance-ready"]


def test_without_a_socket_unit_the_manager_keeps_our_socket_for_the_next_daemon(manager: ServiceManager) -> None:
    port = free_port()
    first = begin(manager, {}, port)
    try:
        wait_healthy(first)
        assert [name for name, _ in manager.stored] == [f"listen-{HOST}_{port}"]
        first.signal(signal.SIGKILL)
        first.exit()
        with closing(http.client.HTTPConnection(HOST, port, timeout=30)) as early:
            early.request("GET", "/health")  # nobody is there, and nobody refuses it
            second = begin(manager, {}, port)
            try:
                assert early.getresponse().status == 200
                second.close()
            finally:
                second.discard()
    finally:
        first.discard()


def test_sockets_of_several_units_win_over_the_config(manager: ServiceManager) -> None:
    four = manager.listen((HOST, 0))[1]
    manager.listen(str(manager.folder / "api.sock"), socket.AF_UNIX, name="ml-offload-unix.socket")
    six = manager.listen(("::1", 0), socket.AF_INET6)[1] if socket.has_ipv6 else 0
    with under(manager, {}) as daemon:
        manager.wait_word("READY")
        in_config, daemon.port = daemon.port, four
        assert daemon.request("GET", "/health").status == 200
        assert daemon.request("GET", "/health", headers={"Host": "[::1]"}).status == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, in_config))
        if six:
            socket.create_connection(("::1", six)).close()
        with socket.socket(socket.AF_UNIX) as file:
            file.connect(str(manager.folder / "api.sock"))
            file.sendall(b"GET /health HTTP/1.1\r\nHost: any\r\nConnection: close\r\n\r\n")
            assert file.recv(12) == b"HTTP/1.1 200"
        assert manager.stored == []


@dataclass(slots=True)
class Visitors:
    """Clients that come one after another, each with a connection of its own, until told to stop."""

    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    _enough: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Visitors:
        for body in (None, None, chat(tokens=3), chat(tokens=8)):
            self._threads.append(threading.Thread(target=self._come, args=(body,)))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def come(self, more: int) -> None:
        """Wait until so many more of them have been here."""
        wanted = self.outcomes.total() + more
        until(lambda: self.outcomes.total() >= wanted, f"{more} more visitors", 60)

    def _come(self, body: Any) -> None:
        while not self._enough.is_set():
            begun = time.monotonic()
            self.outcomes[self._ask(body)] += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            self._enough.wait(0.01)

    def _ask(self, body: Any) -> str:
        try:
            with closing(http.client.HTTPConnection(HOST, self.port, timeout=60)) as connection:
                connection.request("POST" if body else "GET", CHAT if body else "/v1/models", json.dumps(body) if body else None)
                answer = connection.getresponse()
                answer.read()
                return str(answer.status)
        except OSError as error:
            return type(error).__name__
        except http.client.HTTPException as error:
            return type(error).__name__


@pytest.mark.timeout(60 + 20 * RESTARTS)
def test_nobody_is_refused_while_the_service_restarts_again_and_again(manager: ServiceManager) -> None:
    port = manager.listen((HOST, 0))[1]
    daemon = begin(manager, {"a": model(parallel=4, queue={"max_wait": "60s"})}, port)
    try:
        with Visitors(port) as visitors:
            for _ in range(RESTARTS):
                heard = len(manager.messages)
                daemon.wait_for("a", within_s=60)
                visitors.come(20)
                daemon.term()
                assert daemon.exit() == 0
                assert not daemon.leftovers()
                daemon = begin(manager, {}, port)
                manager.wait_word("READY", since=heard)
        print(f"{RESTARTS} restarts, {visitors.outcomes.total()} connections, longest wait {visitors.longest_s:.1f} s")
        assert visitors.outcomes == Counter({"200": visitors.outcomes.total()})
        daemon.close()
    finally:
        daemon.discard()


def test_a_socket_unit_that_a_network_reaches_needs_keys_at_the_start_and_at_each_reload(manager: ServiceManager) -> None:
    port = manager.listen(("0.0.0.0", 0))[1]
    bare = begin(manager, {}, port)
    try:
        assert bare.exit() == 1
        assert "the socket unit opens 0.0.0.0:" in bare.log
    finally:
        bare.discard()
    keys = {"auth": {"keys": [{"name": "ops", "key": "k" * 32, "scopes": ["admin"]}]}}
    bare.write({}, server={**bare.base["server"], **keys})
    daemon = begin(manager, {}, port)
    try:
        manager.wait_word("READY")
        daemon.write({})
        manager.wait_for(
            lambda m: "READY" in m and m["STATUS"].startswith("config refused: the socket unit opens 0.0.0.0:"), "the refusal"
        )
        daemon.close()
    finally:
        daemon.discard()
