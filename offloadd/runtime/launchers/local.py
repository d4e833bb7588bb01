"""Processes on this machine: a session and, where we may, a control group of their own; output into a file; the end by pidfd."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from offloadd.accounts import Account, step_to
from offloadd.environment import engine_environment
from offloadd.runtime.launchers import Remains, shared
from offloadd.runtime.launchers.cgroups import Group, GroupEvidence, delegated
from offloadd.runtime.launchers.folders import Folders
from offloadd.runtime.launchers.identity import Stat, all_pids, boot_id, environment, stat
from offloadd.runtime.launchers.pidfds import told_status
from offloadd.state.launch import ExitStatus, Launch
from offloadd.state.life import Life, ProcessId, SharedPiece

MARK = "OFFLOADD_INSTANCE"
HOME_MARK = "OFFLOADD_DATA_DIR"
_MARKS = frozenset({MARK, HOME_MARK})
_ENTER = '{ echo 0 > "$0"; } 2>/dev/null; exec "$@"'
"""Into the group before the program begins: whatever it forks is then born in it. One that cannot enter runs all the same."""
_ASKED = 5
_ASK_EVERY = 0.01
"""How often, and with how many seconds between, the kernel is asked how a process ended that is not our child."""
_EMPTY_WITHIN = 1.0
"""Seconds that a killed group is given to become empty before its books are read and it is taken away."""


class LocalProcess:
    """A process and what it forks: our child, or one that an earlier daemon started. Must be created on the event loop's thread."""

    def __init__(
        self, process: ProcessId, *, ours: bool, group: Group | None, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ours = ours
        self._group = group
        self._child = child
        self._ended = False
        """Whether it is dead, or none of our business any more: its number may then be another's."""
        self.id = process
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._on_end)

    @property
    def pid(self) -> int:
        """The leader's pid."""
        return self.id.pid

    def terminate(self) -> None:
        """SIGTERM to the leader."""
        if not self._ended:
            with suppress(ProcessLookupError, PermissionError):  # another user's, and we have lost the right to: see `stuck`
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole tree. While the leader is not known to have ended, the group's number is its own."""
        if not self._ended:
            with suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._kill_rest()

    def let_go(self) -> None:
        """Stop watching it, and let it live."""
        if not self.exited.done():
            self._ended = True
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.exited.cancel()
            self._forget_child()

    def _on_end(self) -> None:
        """Our own child is a zombie: until it is reaped its pid, and so the group's number, cannot belong to anybody else.

        One that was started by an earlier daemon is reaped by another, so its group's number says nothing any more: what is left of
        its tree is found by the sweep.
        """
        self._loop.remove_reader(self._pidfd)
        self._ended = True
        if not self._ours:
            if self._group is not None:
                self._group.kill()
            self._ask_how(_ASKED)
            return
        self._kill_rest()
        status = ExitStatus()
        with suppress(ChildProcessError):  # somebody else has reaped it, and nothing is known of its end
            status = _status(os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED))
        self._finish(status)

    def _ask_how(self, tries: int) -> None:
        """Whoever reaps it may need a moment, after which the kernel tells. It is not waited for long."""
        if self.exited.done():
            return  # let go meanwhile
        status = told_status(self._pidfd)
        if status is None and tries > 1:
            self._loop.call_later(_ASK_EVERY, self._ask_how, tries - 1)
        else:
            self._finish(status or ExitStatus())

    def _finish(self, status: ExitStatus) -> None:
        os.close(self._pidfd)
        self._forget_child()
        if not self.exited.done():
            self.exited.set_result(status)

    def _kill_rest(self) -> None:
        if self._group is not None:
            self._group.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _forget_child(self) -> None:
        """We reap it ourselves or leave it alive, so Popen must do neither."""
        if self._child is not None:
            self._child.returncode = 0


class LocalLauncher:
    """Starts children of the daemon. `home` is the daemon's data folder, which marks all that belongs to it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._groups = delegated(home)
        self._folders = Folders(home)
        self.boot = boot_id()

    def spawn(self, launch: Launch, *, mark: str, log_path: Path, account: Account | None = None) -> LocalProcess:
        """Run it with no standard input. A file takes its output: a pipe would stop it when nobody reads, or die with us."""
        step = step_to(account)
        group = self._make_group(mark)
        variables = self._environment(launch.env, mark, account)
        with log_path.open("ab", buffering=0) as log:
            child = subprocess.Popen(
                _behind(step, group, launch.argv, variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                start_new_session=True,
            )
        try:
            # Not reaped yet, so /proc has it, be it a zombie.
            return LocalProcess(_identity(child.pid), ours=True, group=group, child=child)
        except OSError:
            # No descriptor left to watch it by: a process that nobody watches must not live.
            if group is not None:
                group.kill()
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise

    def make_folder(self, mark: str, account: Account | None) -> str:
        """A folder for the launch with this mark, of that account; empty where none can be made. Blocks."""
        made = self._folders.make(mark, account)
        return "" if made is None else str(made)

    def drop_folder(self, mark: str) -> None:
        """Take it away with all that is in it. Blocks."""
        self._folders.remove(mark)

    def shared(self, process: ProcessId, life: Life) -> tuple[SharedPiece, ...]:
        """What its group, or else its session, has of the machine's shared memory, and what it had that is still there. Blocks."""
        group = self._groups.of(life.mark) if self._groups else None
        members = group.pids() if group is not None else []
        found = shared.mapped(members or _session(process)) | shared.still_there(life.shared)
        return tuple(sorted(found))[: shared.MOST]

    def find(self, life: Life) -> ProcessId | None:
        """By pid and start time where they were written down, else by the mark, which the leader of a session carries. Blocks."""
        if not self.boot or life.boot != self.boot:
            return None
        if life.process is None:
            return next((found.id for found in self._marked(life.mark) if found.session == found.pid), None)
        found = stat(life.process.pid)
        if found is None or found.id != life.process:
            return None
        marks = environment(found.pid, _MARKS)
        return found.id if marks.get(MARK, life.mark) == life.mark else None

    def adopt(self, process: ProcessId, *, mark: str) -> LocalProcess | None:
        """Watch it; checked again once the descriptor is held, after which the pid cannot change its owner unseen."""
        found = stat(process.pid)
        if found is None or found.id != process:
            return None
        group = self._groups.of(mark) if self._groups else None
        if group is not None and not group.path.is_dir():
            group = None  # it was started where groups could not be made
        try:
            adopted = LocalProcess(process, ours=found.parent == os.getpid(), group=group)
        except OSError:
            return None
        again = stat(process.pid)
        if again is None or again.id != process:
            adopted.let_go()
            return None
        return adopted

    def sweep(self, life: Life, process: ProcessId) -> Remains:
        """Kill what is left by group, by mark, and by the session that it led; of a dead tree, take away what it left. Blocks."""
        mark = life.mark
        group = self._groups.of(mark) if self._groups else None
        left = list(self._leftovers(mark, process))
        pieces = shared.mapped(each.pid for each in left).union(life.shared)
        killed = _kill_all(left)
        evidence = GroupEvidence()
        if group is not None and group.path.is_dir():
            killed += group.kill()
            _wait(lambda: not group.populated)
        _wait(lambda: not any(_lives(each) for each in left))
        if group is not None and group.path.is_dir():
            evidence = group.evidence()
            group.remove()
        gone = not any(_lives(each) for each in left) and not (group is not None and group.populated)
        if gone:  # else the next daemon does it
            self._folders.remove(mark)
            self._folders.discard(life.endpoint.folder)
        taken = shared.remove(pieces) if gone else 0
        return Remains(killed=killed, oom_kills=evidence.oom_kills, peak=evidence.peak, shared=taken)

    def sweep_home(self, kept: AbstractSet[str], lost: Sequence[Life]) -> int:
        """Kill whatever an earlier daemon with this data folder left running, but for those with these marks. Blocks.

        Then take away what those left, and what the `lost` have left that have ended.
        """
        strays = [found for found in self._at_home() if environment(found.pid, _MARKS).get(MARK) not in kept]
        pieces = shared.mapped(stray.pid for stray in strays)
        killed = _kill_all(strays)
        if self._groups is not None:
            killed = max(killed, self._groups.sweep(kept))
        _wait(lambda: not any(_lives(stray) for stray in strays))
        _reap_the_dead()
        if not any(_lives(stray) for stray in strays):
            self._folders.sweep(kept)
            take_away(self._folders, lost, pieces, self.boot)
        return killed

    def close(self) -> None:
        """Take away what was made for control groups and folders, if nothing is left in it."""
        self._folders.close()
        if self._groups is not None:
            self._groups.remove()

    def _make_group(self, mark: str) -> Group | None:
        if self._groups is None:
            return None
        group = self._groups.of(mark)
        try:
            group.make()
        except OSError:
            return None  # without one it is watched as on any machine that has none
        return group

    def _leftovers(self, mark: str, process: ProcessId) -> Iterator[Stat]:
        """What carries the mark, and what is in the dead leader's session: a program that renames itself may have lost the mark.

        While a session has members its number is not given out again; a living process of that number tells that it had none left.
        """
        led = stat(process.pid) is None
        for pid in all_pids():
            found = stat(pid)
            if found is not None and ((led and found.session == process.pid) or environment(pid, _MARKS).get(MARK) == mark):
                yield found

    def _marked(self, mark: str) -> Iterator[Stat]:
        for found in self._at_home():
            if environment(found.pid, _MARKS).get(MARK) == mark:
                yield found

    def _at_home(self) -> Iterator[Stat]:
        for pid in all_pids():
            if environment(pid, _MARKS).get(HOME_MARK) == str(self._home) and (found := stat(pid)) is not None:
                yield found

    def _environment(self, added: Mapping[str, str], mark: str, account: Account | None) -> dict[str, str]:
        who = account.environment if account else None
        return engine_environment({**added, MARK: mark, HOME_MARK: str(self._home)}, who)


def take_away(folders: Folders, lost: Sequence[Life], pieces: set[SharedPiece], boot: str) -> None:
    """What ended instances have left: their folders, wherever they were, and shared memory, which no boot outlives. Blocks."""
    for life in lost:
        folders.discard(life.endpoint.folder)
    shared.remove(pieces.union(*(life.shared for life in lost if boot and life.boot == boot)))


def _session(process: ProcessId) -> Iterator[int]:
    """The processes of the session that it leads, while it lives."""
    for pid in all_pids():
        found = stat(pid)
        if found is not None and found.session == process.pid:
            yield pid


def _behind(step: tuple[str, ...], group: Group | None, argv: tuple[str, ...], variables: Mapping[str, str]) -> tuple[str, ...]:
    """The command line behind a step into the group, which only we may take, and then one to its user.

    OSError as the program itself would give it when it cannot be run.
    """
    if not step and group is None:
        return argv
    program = shutil.which(argv[0], path=variables.get("PATH"))
    if program is None:
        there = Path(argv[0]).exists()
        raise PermissionError(13, "Permission denied") if there else FileNotFoundError(2, "No such file or directory")
    enter = () if group is None else ("/bin/sh", "-c", _ENTER, str(group.path / "cgroup.procs"))
    return (*enter, *step, program, *argv[1:])


def _identity(pid: int) -> ProcessId:
    """A child's identity. One that has ended already is a zombie, of which nobody will ask again."""
    found = stat(pid)
    return found.id if found else ProcessId(pid=pid, started=0)


def _status(result: os.waitid_result | None) -> ExitStatus:
    if result is None:
        return ExitStatus()
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    return ExitStatus(signal=result.si_status)


def _lives(process: Stat) -> bool:
    now = stat(process.pid)
    return now is not None and now.id == process.id


def _kill_all(processes: Sequence[Stat]) -> int:
    killed = 0
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
    return killed


def _reap_the_dead() -> None:
    """Children of the program that ran in this process before us, dead and never asked for. Later, each is asked for by itself."""
    with suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is not None:
            pass


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _EMPTY_WITHIN
    while not done() and time.monotonic() < deadline:
        time.sleep(0.002)
