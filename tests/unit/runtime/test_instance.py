"""One instance with a launcher that is told what to do: processes that no signal ends, and what is written down when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

from offloadd.accounts import Account
from offloadd.backends.llamacpp import BACKEND
from offloadd.clock import SystemClock
from offloadd.runtime.instances import Tools, stop
from offloadd.runtime.instances.instance import Instance
from offloadd.runtime.launchers import Remains
from offloadd.runtime.logs import LogFolder
from offloadd.state.actions import StartInstance, StopReason
from offloadd.state.desired import Engine, HealthPolicy, ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Candidate, Endpoint, ExitKind, ExitStatus, Launch, ModelFacts, Placement, Probe, ProbeReply
from offloadd.state.life import Life, ProcessId, SharedPiece
from offloadd.state.observed import ExitRecord, InstanceState
from offloadd.units import Bytes, Seconds

ENGINE = Engine(name=BackendName("llamacpp"), adapter="llamacpp", command=("llama-server",))
SPEC = ModelSpec(name=ModelName("a"), source="a.gguf", backends=(ENGINE.name,), stop_timeout=Seconds(0.02))
ACTION = StartInstance(
    instance=InstanceId(LOCAL, ModelName("a"), 1),
    spec=SPEC,
    candidate=Candidate(backend=ENGINE.name, facts=ModelFacts(path="/a.gguf", identity="file-1"), fingerprint="now"),
    placement=Placement(reserved={HOST_RAM: Bytes(5)}),
    why="a test",
)


class Script:
    """Launcher, process and book of lives in one; `steps` is what happened, in order."""

    id = ProcessId(pid=77, started=1)
    pid = 77

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()

    def keep(self, life: Life) -> None:
        self.steps.append("stop" if life.stopping else "ready" if life.ready_at else "record" if life.process else "intent")

    def drop(self, mark: str) -> None:
        self.steps.append("drop")

    def keep_exits(self, boot: str, model: ModelName, records: Sequence[ExitRecord]) -> None: ...

    def spawn(self, launch: Launch, *, mark: str, log_path: Path, account: Account | None = None) -> Script:
        self.steps.append("spawn")
        return self

    def find(self, life: Life) -> ProcessId | None:
        return None

    def adopt(self, process: ProcessId, *, mark: str) -> None:
        return None

    def make_folder(self, mark: str, account: Account | None) -> str:
        return ""

    def drop_folder(self, mark: str) -> None:
        self.steps.append("drop folder")

    def shared(self, process: ProcessId, life: Life) -> tuple[SharedPiece, ...]:
        return ()

    def sweep(self, life: Life, process: ProcessId) -> Remains:
        self.steps.append("sweep")
        return Remains()

    def sweep_home(self, kept: AbstractSet[str], lost: Sequence[Life]) -> int:
        return 0

    def close(self) -> None: ...

    def terminate(self) -> None:
        self.steps.append("term")

    def kill(self) -> None:
        if "kill" not in self.steps:
            self.steps.append("kill")

    def let_go(self) -> None:
        self.exited.cancel()


async def answers(endpoint: Endpoint, probe: Probe) -> ProbeReply:
    body = b'{"data": [{"id": "a"}]}' if probe.path == "/v1/models" else b"[]"
    return ProbeReply(status=200, body=body)


def tools_of(script: Script, folder: Path) -> Tools:
    return Tools(
        clock=SystemClock(),
        launcher=script,
        logs=LogFolder(folder),
        lives=script,
        boot="boot",
        probe=answers,
        holds_port=lambda pid, port: True,
        open_ports=lambda pid: (),
        changed=lambda instance: None,
        held=lambda instance: 0,
        health=lambda instance: HealthPolicy(),
        hang_up=lambda instance, why, died: None,
    )


def begin(script: Script, folder: Path) -> Instance:
    return Instance(ACTION, BACKEND, ENGINE, tools_of(script, folder))


async def become(instance: Instance, wanted: InstanceState) -> None:
    async with asyncio.timeout(10):
        while instance.view().state is not wanted:
            await asyncio.sleep(0.005)


async def happened(script: Script, step: str) -> None:
    async with asyncio.timeout(10):
        while step not in script.steps:
            await asyncio.sleep(0.005)


async def test_everything_is_written_down_before_it_is_done(tmp_path: Path) -> None:
    script = Script()
    instance = begin(script, tmp_path)
    running = asyncio.create_task(instance.run())
    await happened(script, "ready")
    instance.stop(StopReason.IDLE, "nobody wants it")
    await happened(script, "term")
    script.exited.set_result(ExitStatus(code=0))
    record = await running
    assert [step for step in script.steps if step != "kill"] == [
        *("intent", "spawn", "record", "ready", "stop", "term", "sweep", "drop")
    ]
    assert record.expected


async def test_a_process_that_sigkill_does_not_end_is_told_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "STUCK_AFTER", Seconds(0.02))
    script = Script()
    instance = begin(script, tmp_path)
    running = asyncio.create_task(instance.run())
    await become(instance, InstanceState.READY)
    instance.stop(StopReason.HUNG, "it is silent")
    async with asyncio.timeout(10):
        while not instance.view().stuck:
            await asyncio.sleep(0.005)
    assert instance.view().state is InstanceState.STOPPING
    assert instance.view().placement.total == 5
    script.exited.set_result(ExitStatus(signal=9))
    record = await running
    assert record.cause.kind is ExitKind.HUNG


async def test_one_that_is_let_go_is_neither_killed_nor_forgotten(tmp_path: Path) -> None:
    script = Script()
    instance = begin(script, tmp_path)
    running = asyncio.create_task(instance.run())
    await become(instance, InstanceState.READY)
    instance.let_go()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not {"kill", "term", "drop", "sweep"} & set(script.steps)
