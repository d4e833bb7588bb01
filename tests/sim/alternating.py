"""Two models that do not fit together, asked for in turn: our plans against plain first come, first served, in the same world."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from offloadd.state.actions import StartInstance, StopInstance, StopReason
from offloadd.state.desired import DesiredState, QueueLimits
from offloadd.state.ids import LOCAL, InstanceId, ModelName
from offloadd.state.launch import Placement
from offloadd.state.observed import InstanceState
from offloadd.units import Bytes, Seconds
from tests.sim import faults
from tests.sim.machine import GIB, gpu
from tests.sim.properties import check_cycle
from tests.sim.world import Request, Shape, World, spec

NAMES = (ModelName("a"), ModelName("b"))
REQUESTS = 200
EVERY = 0.2
SLOTS = 4
RUNS_FOR = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a way of serving fared. Spans are seconds."""

    served: int
    swaps: int
    longest: float
    mean: float
    took: float

    def __str__(self) -> str:
        waits = f"waits {self.mean:.1f} s on average, {self.longest:.1f} s at most"
        return f"{self.served} of {REQUESTS} served, {self.swaps} swaps, {waits}, all done after {self.took:.0f} s"


def make_world(load: float, max_wait: float) -> World:
    """One card with room for one of the two."""
    limits = QueueLimits(max_waiting=REQUESTS, max_wait=Seconds(max_wait))
    specs = [spec(name, context=0, parallel=SLOTS, queue=limits, idle_timeout=Seconds(600)) for name in NAMES]
    world = World(
        DesiredState(models={one.name: one for one in specs}),
        dict.fromkeys(NAMES, 16.0),
        total=64.0,
        gpus=[gpu(0, 24.0)],
        shapes=dict.fromkeys(NAMES, Shape()),
    )
    for name in NAMES:
        faults.loads_in(world, name, load)
    return world


def with_plans(load: float, max_wait: float = 120.0) -> Result:
    """The planner, every property checked in every cycle, and the lines of `admission`."""
    world = make_world(load, max_wait)

    def cycle() -> float:
        step = check_cycle(world, replan=False)
        return 0.05 if step.plan.actions else min(0.5, max(0.01, (step.plan.wake_at or world.now + 0.5) - world.now))

    return _run(world, cycle)


def first_come_first_served(load: float) -> Result:
    """One line for all: the model of the one at its head is loaded, and nobody overtakes. Same loads, ends and releases."""
    world = make_world(load, 1e6)
    line: deque[Request] = deque()
    numbers = dict.fromkeys(NAMES, 0)

    def arrive(name: ModelName) -> Request:
        request = Request(model=name, arrived=world.now, runs_for=RUNS_FOR)
        world.requests.append(request)
        line.append(request)
        return request

    def cycle() -> float:
        while line and (ready := _ready(world, line[0].model)) and len(world.processes[ready].held) < SLOTS:
            world._grant(line.popleft(), ready)
        for process in list(world.processes.values()):
            if process.state is InstanceState.EXITED:
                del world.processes[process.id]
        if line and not any(process.id.model == line[0].model for process in world.processes.values()):
            _swap(world, line[0].model, numbers)
        return 0.05

    return _run(world, cycle, arrive)


def _ready(world: World, model: ModelName) -> InstanceId | None:
    views = world.processes.values()
    return next((one.id for one in views if one.id.model == model and one.state is InstanceState.READY), None)


def _swap(world: World, model: ModelName, numbers: dict[ModelName, int]) -> None:
    """Send the other away as soon as it is idle, and start this one as soon as the memory is seen to be free."""
    for process in world.processes.values():
        if process.state is InstanceState.READY and not process.held:
            world._stop(StopInstance(instance=process.id, reason=StopReason.EVICTED, why="the next in line wants another"))
    card = world.machine.gpus[0]
    if world.processes or world.machine.free(card.id) < 16 * GIB:
        return
    numbers[model] += 1
    wanted = world.desired.models[model]
    place = Placement(reserved={card.id: Bytes(16 * GIB)}, gpus=(card.id,))
    key = InstanceId(LOCAL, model, numbers[model])
    world._start(StartInstance(instance=key, spec=wanted, candidate=world.candidates(wanted)[0], placement=place, why="next"))


def _run(world: World, cycle: Callable[[], float], arrive: Callable[[ModelName], Request] | None = None) -> Result:
    begun, asked = world.now, list[Request]()
    next_at = world.now
    while len(asked) < REQUESTS or world.requests:
        if len(asked) < REQUESTS and world.now >= next_at:
            name = NAMES[len(asked) % 2]
            asked.append(arrive(name) if arrive else world.arrive(name, runs_for=RUNS_FOR))
            next_at += EVERY
        pause = cycle()
        if len(asked) < REQUESTS:
            pause = min(pause, max(0.001, next_at - world.now))
        world.advance(pause)
    done = [request for request in asked if request.end == "done"]
    waits = [request.granted_at - request.arrived for request in done if request.granted_at is not None]
    return Result(
        served=len(done),
        swaps=sum(world.launches.values()) - 1,
        longest=max(waits, default=0.0),
        mean=sum(waits) / max(1, len(waits)),
        took=world.now - begun,
    )
