"""Processes on this machine: a session of their own, output into a file, the end seen through a pidfd."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from offloadd.environment import engine_environment
from offloadd.state.launch import ExitStatus, Launch

MARK = "OFFLOADD_INSTANCE"
HOME_MARK = "OFFLOADD_DATA_DIR"


class LocalProcess:
    """One child and what it forks. Must be created on the event loop's thread."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self.pid = child.pid
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._pidfd = os.pidfd_open(child.pid)
        self._loop.add_reader(self._pidfd, self._on_end)

    def terminate(self) -> None:
        """SIGTERM to the leader."""
        if not self.exited.done():
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the leader and its group."""
        if not self.exited.done():
            self._kill_group()

    def _on_end(self) -> None:
        """The leader is a zombie: until it is reaped its pid, and so the group's number, cannot belong to anybody else."""
        self._loop.remove_reader(self._pidfd)
        self._kill_group()
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        status = _status(result)
        # We have reaped it, so Popen must not try to.
        self._child.returncode = -(status.signal or 0) or (status.code or 0)
        self.exited.set_result(status)

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


class LocalLauncher:
    """Starts children of the daemon. `home` is the daemon's data folder, which marks all that belongs to it."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def spawn(self, launch: Launch, *, mark: str, log_path: Path) -> LocalProcess:
        """Run it with no standard input. A file takes its output: a pipe would stop it when nobody reads, or die with us."""
        with log_path.open("ab", buffering=0) as log:
            child = subprocess.Popen(
                launch.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(launch.env, mark),
                start_new_session=True,
            )
        try:
            return LocalProcess(child)
        except OSError:
            # No descriptor left to watch it by: a process that nobody watches must not live.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise

    def sweep(self, mark: str) -> int:
        """Kill what carries the mark though it left the group, as a daemonised grandchild does; the number killed. Blocks."""
        return _kill_all(_marked(MARK, mark))

    def sweep_home(self) -> int:
        """Kill whatever an earlier daemon with this data folder left running; the number killed. Blocks."""
        return _kill_all(_marked(HOME_MARK, str(self._home)))

    def _environment(self, added: Mapping[str, str], mark: str) -> dict[str, str]:
        return engine_environment({**added, MARK: mark, HOME_MARK: str(self._home)})


def _status(result: os.waitid_result | None) -> ExitStatus:
    if result is None:
        return ExitStatus()
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    return ExitStatus(signal=result.si_status)


def _marked(variable: str, value: str) -> Iterator[psutil.Process]:
    """Every process with `variable=value` in its environment, as far as we may look."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.pid != os.getpid():
                yield process
        except psutil.Error:
            continue


def _kill_all(processes: Iterator[psutil.Process]) -> int:
    killed = 0
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
        killed += 1
    return killed
