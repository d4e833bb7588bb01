"""What any engine's adapter must do together with a server behind it: one suite for all, with real servers and stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from offloadd.backends.base import Backend, TellsLoad, fingerprint
from offloadd.observe.probes import Prober, open_session
from offloadd.runtime.launchers import shared as pieces_of
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.launch import Endpoint, ExitCause, ExitKind, ExitStatus, Health, ModelFacts, Placement, Probe, ProbeReply
from tests.conformance.processes import Server, free_port, kill_session, session, until
from tests.conformance.servers import Reply

HELLO = [{"role": "user", "content": "Say hello."}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FINISH_REASONS = {"stop", "length"}


@dataclass(frozen=True, slots=True)
class Behind:
    """An adapter and the server that it is tested with."""

    backend: Backend
    engine: Engine
    spec: ModelSpec
    facts: ModelFacts
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready_within_s: float = 30
    keyed: bool = True
    """Whether it refuses requests without the launch's key."""
    tells_models_apart: bool = True
    """Whether its readiness notices that another model answers on its port."""
    explains_options: bool = True
    """Whether the adapter knows how the server complains of options and ports."""
    slow: Mapping[str, str] = field(default_factory=dict)
    """Knobs that make it slow to load, for tests that look at it meanwhile."""

    @contextlib.contextmanager
    def start(self, *, spec: ModelSpec | None = None, env: Mapping[str, str] | None = None, port: int = 0) -> Iterator[Engaged]:
        """Start the server as the daemon does; all that it leaves behind is killed at the end."""
        spec = spec or self.spec
        more = tuple(free_port() for _ in range(self.backend.more_ports))
        own = tempfile.mkdtemp(prefix="o-")
        endpoint = Endpoint(host="127.0.0.1", port=port or free_port(), more=more, key="0" * 64, folder=own)
        launch = self.backend.launch(self.engine, spec, self.facts, Placement(reserved={}), endpoint)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        log_path = self.folder / f"{endpoint.port}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                launch.argv,
                env={**kept, "TMPDIR": own, **launch.env, **self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        server = Engaged(self, endpoint, Server(process, endpoint.port, spec, log_path))
        try:
            yield server
        finally:
            pieces = pieces_of.mapped(each.pid for each in session(process.pid))
            kill_session(process.pid)
            server.server.kill()
            until(lambda: not session(process.pid), "nothing is left")
            pieces_of.remove(pieces)
            shutil.rmtree(own)


@dataclass(slots=True)
class Engaged:
    """A running server, seen through its adapter."""

    behind: Behind
    endpoint: Endpoint
    server: Server

    @property
    def spec(self) -> ModelSpec:
        return self.server.spec

    def probe(self, probe: Probe) -> ProbeReply:
        """As the daemon's own prober does it."""

        async def ask() -> ProbeReply:
            async with open_session() as session:
                return await Prober(session)(self.endpoint, probe)

        return asyncio.run(ask())

    def reads(self, probe: Probe, spec: ModelSpec | None = None) -> Health:
        return self.behind.backend.read_probe(spec or self.spec, probe.path, self.probe(probe))

    def wait_ready(self) -> None:
        """All readiness probes in order, as an instance does."""
        for probe in self.behind.backend.probes(self.spec).readiness:

            def ready(probe: Probe = probe) -> bool:
                code = self.server.process.poll()
                assert code is None, f"ended with {code}:\n" + "\n".join(self.server.log[-20:])
                return self.reads(probe) is Health.READY

            until(ready, f"{probe.path} reads ready", self.behind.ready_within_s)

    def ask(self, path: str, body: Any, *, key: bool = True) -> Reply:
        """A request as the relay sends it, the model named as the adapter says."""
        model = self.behind.backend.api(self.spec).model
        with contextlib.closing(self.server.connect(120)) as connection:
            headers = {"Content-Type": "application/json", **(self.endpoint.headers if key else {})}
            data = json.dumps({**({"model": model} if model else {}), **body})
            connection.request("POST", self.endpoint.at(path), data, headers)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    @contextlib.contextmanager
    def begun(self, tokens: int) -> Iterator[None]:
        """A stream that has begun, and whose client leaves at the end."""
        model = self.behind.backend.api(self.spec).model
        body = {**({"model": model} if model else {}), "messages": HELLO, "max_tokens": tokens, "stream": True}
        connection = self.server.connect()
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json", **self.endpoint.headers})
        response = connection.getresponse()
        response.readline()
        try:
            yield
        finally:
            connection.sock.shutdown(socket.SHUT_RDWR)
            response.close()
            connection.close()

    def cause(self, status: ExitStatus, *, was_ready: bool = False) -> ExitCause:
        return self.behind.backend.explain_exit(status, self.server.log, was_ready=was_ready)


class EngineConformance:
    """A subclass provides the fixture `behind`, scoped to the class."""

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, behind: Behind) -> Iterator[Engaged]:
        """One ready server for the tests that leave it as they found it."""
        with behind.start() as server:
            server.wait_ready()
            yield server

    # --- ready ---

    def test_every_probe_reads_ready(self, shared: Engaged) -> None:
        probes = shared.behind.backend.probes(shared.spec)
        for probe in (*probes.readiness, probes.liveness, *filter(None, [probes.canary])):
            assert shared.reads(probe) is Health.READY, probe

    def test_one_that_loads_is_not_ready(self, behind: Behind) -> None:
        if not behind.slow:
            pytest.skip("it has no way to be slow")
        with behind.start(env=behind.slow) as server:
            first = behind.backend.probes(server.spec).readiness[0]
            for _ in range(5):
                assert server.reads(first) in (Health.SILENT, Health.LOADING)

    def test_a_server_with_another_model_is_not_ours(self, shared: Engaged) -> None:
        if not shared.behind.tells_models_apart:
            pytest.skip("its API does not tell models apart")
        other = replace(shared.spec, name="other")
        probes = shared.behind.backend.probes(other).readiness
        assert any(shared.reads(probe, other) is not Health.READY for probe in probes)

    # --- answers ---

    @pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hello"})])
    def test_a_whole_answer(self, shared: Engaged, path: str, asked: dict[str, Any]) -> None:
        reply = shared.ask(path, {**asked, "max_tokens": 4, "temperature": 0})
        assert reply.status == 200, reply.body
        found = reply.json()
        (choice,) = found["choices"]
        assert choice["finish_reason"] in FINISH_REASONS
        assert isinstance(choice["message"]["content"] if path == CHAT else choice["text"], str)
        assert found["usage"]["completion_tokens"] <= 4
        assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]

    @pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hello"})])
    def test_a_stream_ends_with_a_reason_its_usage_and_done(self, shared: Engaged, path: str, asked: dict[str, Any]) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        reply = shared.ask(path, {**asked, "max_tokens": 4, "temperature": 0, **options})
        assert reply.status == 200, reply.body
        assert reply.headers.get("Content-Type", reply.headers.get("content-type", "")).startswith("text/event-stream")
        events = reply.events
        assert events[-1] == "[DONE]"
        reasons = [choice["finish_reason"] for event in events[:-1] for choice in event["choices"]]
        assert reasons[-1] in FINISH_REASONS
        assert not any(reasons[:-1])
        assert [event["usage"]["completion_tokens"] for event in events[:-1] if event.get("usage")]

    def test_a_client_that_leaves_a_stream_ends_its_work(self, shared: Engaged) -> None:
        for _ in range(shared.spec.parallel + 2):  # more than it has places: each must be given back
            with shared.begun(150):
                pass
        assert shared.ask(CHAT, {"messages": HELLO, "max_tokens": 1}).status == 200

    def test_one_that_works_says_so_and_one_that_rests_does_not(self, shared: Engaged) -> None:
        backend: object = shared.behind.backend
        question = backend.load_probe(shared.spec) if isinstance(backend, TellsLoad) else None
        if question is None or not isinstance(backend, TellsLoad):
            pytest.skip("it is not asked for its load")

        def load() -> int:
            told = backend.read_load(shared.spec, shared.probe(question))
            return -1 if told is None else told.running + told.waiting

        def load_with_one() -> bool:
            with shared.begun(150):
                return load() == 1  # unless it was over before it was asked

        until(load_with_one, "it tells of a request that runs", 60)
        until(lambda: load() == 0, "it tells that none runs", 60)

    def test_who_does_not_show_the_key_of_the_launch_is_refused(self, shared: Engaged) -> None:
        if not shared.behind.keyed:
            pytest.skip("it knows no keys")
        assert shared.ask(CHAT, {"messages": HELLO, "max_tokens": 1}, key=False).status == 401
        shown = psutil.Process(shared.server.process.pid).cmdline()
        assert shared.endpoint.key not in " ".join(shown)

    # --- ends ---

    def test_sigterm_ends_all_of_it(self, behind: Behind) -> None:
        with behind.start() as server:
            server.wait_ready()
            assert session(server.server.process.pid)
            server.server.term()
            assert server.server.exit(30).code == 0
            until(lambda: not session(server.server.process.pid), "nothing is left")

    def test_a_death_while_serving_is_a_failure_whatever_its_code(self, behind: Behind) -> None:
        with behind.start() as server:
            server.wait_ready()
            leader = psutil.Process(server.server.process.pid)
            for child in leader.children():
                child.send_signal(signal.SIGKILL)
            if not leader.children():
                leader.kill()
            cause = server.cause(server.server.exit(30), was_ready=True)
            assert cause.kind in (ExitKind.CRASHED, ExitKind.KILLED)
            assert not cause.permanent
            assert cause.message

    def test_a_port_that_is_taken_is_told_from_other_failures(self, behind: Behind) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with behind.start(port=taken.getsockname()[1]) as server:
                cause = server.cause(server.server.exit(behind.ready_within_s))
                assert behind.explains_options is (cause.kind is ExitKind.PORT_TAKEN)

    def test_an_option_that_it_does_not_know_is_permanent_and_named(self, behind: Behind) -> None:
        if not behind.explains_options:
            pytest.skip("nobody knows how it says so")
        with behind.start(spec=replace(behind.spec, args=("--frobnicate",))) as server:
            cause = server.cause(server.server.exit(behind.ready_within_s))
            assert (cause.kind, cause.permanent) == (ExitKind.BAD_OPTION, True)
            assert "--frobnicate" in cause.message

    # --- pure ---

    def test_a_fingerprint_follows_what_reaches_the_command_line_and_nothing_else(self, behind: Behind) -> None:
        def mark(**changes: Any) -> str:
            return fingerprint(behind.backend, behind.engine, replace(behind.spec, **changes), behind.facts)

        assert mark() == mark(priority=7, aliases=("x",), idle_timeout=5.0, pinned=True)
        assert mark() != mark(args=("--x",))
        assert mark() != mark(env={"X": "1"})
