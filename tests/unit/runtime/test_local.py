"""Processes of this machine: their trees end whole, they are found again, and no other is taken for them."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from offloadd.runtime.launchers import cgroups
from offloadd.runtime.launchers.identity import stat
from offloadd.runtime.launchers.local import LocalLauncher, LocalProcess
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint, ExitStatus, Launch, Placement
from offloadd.state.life import Life, ProcessId
from offloadd.units import Instant

MARK = "a-1@cafe"
SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
FORKS = (
    sys.executable,
    "-c",
    """
import os, sys, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
print("forked", flush=True)
time.sleep(600)
""",
)
"""Five grandchildren that left the session, and so the process group."""
HAVE_GROUPS = cgroups.delegated(Path("/nowhere")) is not None
if HAVE_GROUPS and (_groups := cgroups.delegated(Path("/nowhere"))):
    _groups.remove()


@pytest.fixture(params=[True, False], ids=["groups", "no groups"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalLauncher]:
    if request.param and not HAVE_GROUPS:
        pytest.skip("no control groups may be made here")
    monkeypatch.setattr(cgroups, "USED", request.param)
    made = LocalLauncher(tmp_path)
    yield made
    made.sweep_home(frozenset(), ())
    made.close()


async def started(launcher: LocalLauncher, argv: tuple[str, ...], tmp_path: Path, mark: str = MARK) -> LocalProcess:
    process = launcher.spawn(Launch(argv=argv), mark=mark, log_path=tmp_path / "log")
    async with asyncio.timeout(10):
        while process.pid not in marked(tmp_path) and not process.exited.done():
            await asyncio.sleep(0.005)  # the kernel shows an environment a moment after the exec
    return process


async def forked(launcher: LocalLauncher, tmp_path: Path) -> tuple[LocalProcess, list[int]]:
    """One that has forked, and the pids of those that left it."""
    process = await started(launcher, FORKS, tmp_path)
    async with asyncio.timeout(20):
        while b"forked" not in (tmp_path / "log").read_bytes() or len(found := marked(tmp_path)) < 6:
            await asyncio.sleep(0.01)
    return process, [pid for pid in found if pid != process.pid]


def marked(home: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OFFLOADD_DATA_DIR") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def life(process: ProcessId | None, launcher: LocalLauncher) -> Life:
    return Life(
        mark=MARK,
        instance=InstanceId(LOCAL, ModelName("a"), 1),
        spec=ModelSpec(name=ModelName("a"), source="a.gguf", backends=(BackendName("x"),)),
        backend=BackendName("x"),
        fingerprint="f",
        placement=Placement(reserved={}),
        endpoint=Endpoint(host="127.0.0.1", port=1),
        boot=launcher.boot,
        started_at=Instant(0),
        process=process,
    )


async def test_a_tree_that_scattered_ends_whole(launcher: LocalLauncher, tmp_path: Path) -> None:
    process, others = await forked(launcher, tmp_path)
    assert len(others) == 5
    process.kill()
    assert await process.exited == ExitStatus(signal=signal.SIGKILL)
    await asyncio.to_thread(launcher.sweep, life(process.id, launcher), process.id)
    assert marked(tmp_path) == []


async def test_a_leader_that_ends_by_itself_takes_its_tree_along(launcher: LocalLauncher, tmp_path: Path) -> None:
    process, _ = await forked(launcher, tmp_path)
    process.terminate()
    assert await process.exited == ExitStatus(signal=signal.SIGTERM)
    await asyncio.to_thread(launcher.sweep, life(process.id, launcher), process.id)
    assert marked(tmp_path) == []


async def test_the_exit_code_of_a_child_is_its_own(launcher: LocalLauncher, tmp_path: Path) -> None:
    process = await started(launcher, (sys.executable, "-c", "raise SystemExit(7)"), tmp_path)
    assert await process.exited == ExitStatus(code=7)


@pytest.mark.parametrize("argv", [("/no/such/program",), ("no-such-program",)])
async def test_a_program_that_is_not_there(launcher: LocalLauncher, tmp_path: Path, argv: tuple[str, ...]) -> None:
    with pytest.raises(FileNotFoundError):
        await started(launcher, argv, tmp_path)


async def test_a_file_that_may_not_be_run(launcher: LocalLauncher, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    with pytest.raises(PermissionError):
        await started(launcher, (str(plain),), tmp_path)


async def test_it_is_found_by_its_number_and_by_its_mark(launcher: LocalLauncher, tmp_path: Path) -> None:
    process, _ = await forked(launcher, tmp_path)
    assert launcher.find(life(process.id, launcher)) == process.id
    assert launcher.find(life(None, launcher)) == process.id, "the leader, not one of those that it forked"
    process.kill()
    await process.exited


async def test_no_other_is_taken_for_it(launcher: LocalLauncher, tmp_path: Path) -> None:
    process = await started(launcher, SLEEP, tmp_path)
    whole = life(process.id, launcher)
    later = replace(process.id, started=process.id.started + 1)
    assert launcher.find(replace(whole, process=later)) is None, "the pid was used again"
    assert launcher.find(replace(whole, boot="another")) is None, "the machine was started anew"
    assert launcher.find(replace(whole, mark="a-1@beef")) is None, "it carries another mark"
    assert launcher.adopt(later, mark=MARK) is None
    process.kill()
    await process.exited
    assert launcher.find(whole) is None
    assert launcher.adopt(process.id, mark=MARK) is None


async def test_a_zombie_is_dead(launcher: LocalLauncher) -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert stat(child.pid) is None
    child.wait()


async def test_the_end_of_an_adopted_one_is_seen_and_its_tree_ends(launcher: LocalLauncher, tmp_path: Path) -> None:
    """As after a crash: started by another process, which is no more."""
    process, _ = await forked(launcher, tmp_path)
    process.let_go()
    adopted = launcher.adopt(process.id, mark=MARK)
    assert adopted is not None
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await adopted.exited
    await asyncio.to_thread(launcher.sweep, life(process.id, launcher), process.id)
    assert marked(tmp_path) == []


@pytest.mark.parametrize(("how", "status"), [("exit 7", ExitStatus(code=7)), ("kill -9 $$", ExitStatus(signal=9))])
async def test_how_an_adopted_one_ended_where_the_kernel_tells(
    launcher: LocalLauncher, tmp_path: Path, how: str, status: ExitStatus
) -> None:
    """Its parent is another process, which asks for its end as PID 1 would."""
    code = f"import subprocess; child = subprocess.Popen(['sh', '-c', 'read _; {how}']); print(child.pid, flush=True); child.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    found = stat(int(parent.stdout.readline()))
    assert found is not None
    adopted = launcher.adopt(found.id, mark=MARK)
    assert adopted is not None
    parent.communicate(b"\n")
    async with asyncio.timeout(10):
        ended = await adopted.exited
    assert ended in (status, ExitStatus())
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 15):
        assert ended == status


async def test_a_sweep_spares_the_kept(launcher: LocalLauncher, tmp_path: Path) -> None:
    kept = await started(launcher, SLEEP, tmp_path)
    stray = await started(launcher, SLEEP, tmp_path, mark="b-1@f00")
    assert await asyncio.to_thread(launcher.sweep_home, frozenset({MARK}), ()) == 1
    assert stat(kept.pid) is not None
    assert stat(stray.pid) is None
    async with asyncio.timeout(10):
        await stray.exited
    kept.kill()
    await kept.exited


@pytest.mark.skipif(not HAVE_GROUPS, reason="no control groups may be made here")
async def test_a_group_lives_as_long_as_its_instance(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path)
    groups = cgroups.delegated(tmp_path)
    assert groups is not None
    process, others = await forked(launcher, tmp_path)
    assert set(groups.of(MARK).pids()) == {process.pid, *others}
    process.kill()
    await process.exited
    await asyncio.to_thread(launcher.sweep, life(process.id, launcher), process.id)
    assert not groups.of(MARK).path.exists()
    launcher.close()
    assert not groups.of(MARK).path.parent.exists()
