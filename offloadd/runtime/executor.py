"""Applies plans: one task per instance. An action in flight shows in the next snapshot, because its state is set at once."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from offloadd.backends.base import Backend
from offloadd.events import About, EventKind, about
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.instance import Instance
from offloadd.runtime.instances.remote import RemoteInstance
from offloadd.runtime.launchers import Process
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    DrainInstance,
    ForgetInstance,
    GrantLoan,
    Plan,
    RestInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    StopReason,
    WakeInstance,
)
from offloadd.state.desired import BackendKind, Engine, ModelSpec
from offloadd.state.ids import BackendName, InstanceId, ModelName
from offloadd.state.launch import Candidate, ExitCause, ExitKind, ExitStatus, ModelFacts
from offloadd.state.life import Life
from offloadd.state.observed import ExitRecord, InstanceState, InstanceView, ObservedState
from offloadd.units import Seconds

log = logging.getLogger(__name__)

AnyInstance = Instance | RemoteInstance

KEPT_EXITS = 32
"""Ends remembered per model; more than any give_up_after that makes sense."""


class Executor:
    """Owns the instances and the record of their ends."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        engine_of: Callable[[BackendName], Engine],
        tools: Tools,
        lend: Callable[[GrantLoan], None],
    ) -> None:
        self._backends = backends
        self._engine_of = engine_of
        self._tools = tools
        self._lend = lend
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}
        self._instances: dict[InstanceId, AnyInstance] = {}
        self._load_times: dict[ModelName, Seconds] = {}
        self._exits: dict[ModelName, deque[ExitRecord]] = {}
        self._launches: dict[ModelName, int] = dict(tools.logs.launches())

    def apply(self, plan: Plan) -> None:
        """Begin every action of the plan; none is waited for."""
        for action in plan.actions:
            self._begin(action)

    def take_over(self, orphans: Iterable[tuple[Life, Process]], models: Mapping[ModelName, ModelSpec]) -> None:
        """Put what an earlier daemon left running on the books; the planner says what becomes of it."""
        for life, process in orphans:
            self._run_instance(_launched(life, models.get(life.instance.model)), (life, process))

    def remember(self, exits: Mapping[ModelName, Iterable[ExitRecord]]) -> None:
        """How instances ended under an earlier daemon: its death is no reason to try again what was given up."""
        for model, records in exits.items():
            self._exits[model] = deque(records, maxlen=KEPT_EXITS)

    def observed(self) -> ObservedState:
        """What is known of instances without reading the machine."""
        views = self.views()
        for view in views.values():
            if view.ready_at is not None and view.adopted_at is None:
                self._load_times[view.model] = Seconds(view.ready_at - view.started_at)
        return ObservedState(
            instances=views,
            load_times=dict(self._load_times),
            exits={model: tuple(records) for model, records in self._exits.items()},
            launches=dict(self._launches),
        )

    def newest(self, model: ModelName) -> int:
        """The highest number that an instance of the model has had; 0 before the first."""
        return self._launches.get(model, 0)

    def views(self) -> dict[InstanceId, InstanceView]:
        """Every instance on the books."""
        return {key: instance.view() for key, instance in self._instances.items()}

    def get(self, instance: InstanceId) -> AnyInstance | None:
        """The instance, while it is on the books."""
        return self._instances.get(instance)

    def sign_all(self) -> None:
        """Begin anew to wait for signs of life."""
        for instance in self._instances.values():
            instance.sign()

    def pids(self) -> dict[InstanceId, int]:
        """Leaders of the live process trees."""
        return {key: view.pid for key, view in self.alive().items() if view.pid is not None}

    def alive(self) -> dict[InstanceId, InstanceView]:
        """Those that have not ended: the others are on the books for their memory only."""
        return {key: view for key, view in self.views().items() if view.state is not InstanceState.EXITED}

    def forget_models(self, kept: Mapping[ModelName, object]) -> None:
        """Drop the history of models that the config no longer names."""
        for name in [name for name in self._exits if name not in kept]:
            asyncio.get_running_loop().run_in_executor(None, self._tools.lives.keep_exits, self._tools.boot, name, ())
            del self._exits[name]
        self._load_times = {name: span for name, span in self._load_times.items() if name in kept}

    def stop_all(self, why: str) -> None:
        """End every instance now, requests or not."""
        for instance in self._instances.values():
            instance.stop(StopReason.SHUTDOWN, why)

    async def wait_all(self) -> None:
        """Until no instance runs but those that not even SIGKILL ends: the kernel has them, and we wait for no kernel."""
        while self._tasks and not all(self._instances[key].view().stuck for key in self._tasks):
            await asyncio.wait(self._tasks.values(), timeout=1)
        await self.let_go()

    async def let_go(self) -> None:
        """Leave every process running, for the daemon that comes after this one, and watch none any more."""
        tasks = list(self._tasks.items())
        for key, task in tasks:
            self._instances[key].let_go()
            task.cancel()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)

    def _begin(self, action: Action) -> None:
        match action:
            case StartInstance():
                self._run_instance(action)
            case AdoptInstance():
                said = _about(EventKind.INSTANCE_ADOPTED, action.instance)
                log.info("%s: adopted: %s", action.instance, action.why, extra=said)
                self._instances[action.instance].adopt()
            case SleepInstance():
                log.info("%s: falls asleep: %s", action.instance, action.why)
                self._instances[action.instance].fall_asleep(action.free)
            case RestInstance():
                log.debug("%s: may rest: %s", action.instance, action.why)
                self._instances[action.instance].rest(action.keeps)
            case WakeInstance():
                said = _about(EventKind.INSTANCE_WAKING, action.instance)
                log.info("%s: wakes: %s", action.instance, action.why, extra=said)
                self._instances[action.instance].wake_up()
            case DrainInstance():
                log.info(
                    "%s: draining: %s", action.instance, action.why, extra=_about(EventKind.INSTANCE_DRAINING, action.instance)
                )
                self._instances[action.instance].drain(action.deadline)
            case StopInstance():
                said = _about(EventKind.INSTANCE_STOPPING, action.instance, reason=action.reason)
                log.info("%s: stopping (%s): %s", action.instance, action.reason, action.why, extra=said)
                self._instances[action.instance].stop(action.reason, action.why, action.limit)
            case GrantLoan():
                log.info("%s: granted", action.loan, extra=about(EventKind.LOAN_GRANTED, loan=action.loan))
                self._lend(action)
            case ForgetInstance():
                self._instances.pop(action.instance, None)
                self._tools.changed(action.instance)  # its memory is free now, which somebody may be waiting for
            case _:
                assert_never(action)

    def _run_instance(self, action: StartInstance, orphan: tuple[Life, Process] | None = None) -> None:
        engine = self._engine_of(action.candidate.backend)
        instance = self._instance(action, engine, orphan)
        self._instances[action.instance] = instance
        self._launches[action.instance.model] = max(action.instance.number, self._launches.get(action.instance.model, 0))
        self._tasks[action.instance] = asyncio.create_task(self._run(instance), name=f"instance {action.instance}")

    def _instance(self, action: StartInstance, engine: Engine, orphan: tuple[Life, Process] | None) -> AnyInstance:
        backend = self._backends[engine.adapter].bound(engine)
        if engine.kind is BackendKind.EXTERNAL:
            return RemoteInstance(action, backend, engine, self._tools)
        return Instance(action, backend, engine, self._tools, orphan)

    async def _run(self, instance: AnyInstance) -> None:
        try:
            record = await instance.run()
        except Exception as error:
            log.exception("%s: internal error", instance.id, extra=_about(EventKind.INTERNAL_ERROR, instance.id))
            cause = ExitCause(
                kind=ExitKind.CRASHED, message=f"offloadd failed to run it: {error}", hint="this is a bug: see the log"
            )
            record = instance.record(ExitStatus(), cause)
        finally:
            del self._tasks[instance.id]
        _log_end(record)
        records = self._exits.setdefault(instance.id.model, deque(maxlen=KEPT_EXITS))
        records.append(record)
        self._tools.changed(instance.id)
        await asyncio.to_thread(self._tools.lives.keep_exits, self._tools.boot, instance.id.model, tuple(records))


def _launched(life: Life, spec: ModelSpec | None) -> StartInstance:
    """The start that an earlier daemon made. Of what was not written down, the present config's word is taken."""
    then = life.spec
    if spec is not None:
        then = replace(spec, source=then.source, backends=then.backends, context=then.context, parallel=then.parallel)
    offer = Candidate(
        backend=life.backend,
        facts=ModelFacts(identity=life.identity),
        fingerprint=life.fingerprint,
        footprint_key=life.footprint_key,
    )
    return StartInstance(instance=life.instance, spec=then, candidate=offer, placement=life.placement, why="found running")


def _log_end(record: ExitRecord) -> None:
    level = logging.INFO if record.expected else logging.WARNING
    hint = f" ({record.cause.hint})" if record.cause.hint else ""
    said = _about(EventKind.INSTANCE_ENDED, record.instance, record.backend, cause=record.cause.kind, expected=record.expected)
    log.log(level, "%s: ended, %s: %s%s", record.instance, record.status, record.cause.message, hint, extra=said)


def _about(kind: EventKind, instance: InstanceId, backend: BackendName | str = "", **data: object) -> dict[str, About]:
    return about(kind, model=instance.model, instance=instance, backend=backend, **data)
