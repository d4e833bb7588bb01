"""Starts any program that serves HTTP, and asks it; what it leaves in its session is killed at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conformance.servers import SPEC_OF_NONE, Server, free_port, until

STANDINS = Path(__file__).parent.parent / "standin"


@dataclass(frozen=True, slots=True)
class Program:
    """A command, and the variables that it is given beside the few that every program gets."""

    command: tuple[str, ...]
    env: Mapping[str, str]

    @contextlib.contextmanager
    def run(self, argv: Sequence[str], folder: Path, port: int, env: Mapping[str, str] | None = None) -> Iterator[Server]:
        """Run it in a session of its own; both outputs go into one file."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        log_path = folder / f"{port}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*self.command, *argv],
                env={**kept, **self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        server = Server(process, port, SPEC_OF_NONE, log_path)
        try:
            yield server
        finally:
            kill_session(process.pid)
            server.kill()


def standin(name: str, **knobs: object) -> Program:
    """A stand-in by the name of its script, with its knobs."""
    settings = {"TOKEN_S": 0.002, **knobs}
    return Program(
        (sys.executable, str(STANDINS / f"{name}.py")), {f"STANDIN_{key}": str(value) for key, value in settings.items()}
    )


def session(leader: int) -> list[psutil.Process]:
    """Living processes of a session, its leader included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_session(leader: int) -> None:
    """End all that is left of it."""
    for process in session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def wait_serving(server: Server, path: str = "/health", within_s: float = 30) -> Server:
    """Until the path answers 200."""

    def serving() -> bool:
        code = server.process.poll()
        assert code is None, f"ended with {code} while starting:\n" + "\n".join(server.log[-20:])
        return server.probe(path).status == 200

    until(serving, f"{path} answers 200", within_s)
    return server


__all__ = ["Program", "Server", "free_port", "kill_session", "session", "standin", "until", "wait_serving"]
