"""Long runs on machines with GPUs: each seed draws the machine, its models, and then what happens to them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from offloadd.state.desired import Budget, DesiredState, DeviceBudget, RunMode
from offloadd.state.ids import ModelName
from offloadd.units import Bytes, Seconds, Share
from tests.sim import faults
from tests.sim.drive import Driver
from tests.sim.machine import GIB, Card, gpu
from tests.sim.world import ALPHA, BETA, Shape, World, spec

DEVICE_EDITS: Sequence[dict[str, object]] = (
    {"devices": "auto"},
    {"devices": "auto"},
    {"devices": "cpu"},
    {"devices": ("0",)},
    {"devices": ("1", "0")},
    {"devices": ("0", "GPU-1")},
    {"devices": ("0", "GPU-0")},
    {"devices": ("0", "1", "2")},
    {"partial": True},
    {"partial": False},
    {"gpu_layers": "auto"},
    {"gpu_layers": 0},
    {"gpu_layers": 3},
    {"gpu_layers": 99},
)
LOANS = (0.5, 2.0, 6.0, 14.0, 60.0)


def draw_gpus(mix: random.Random, ram: float) -> list[Card]:
    """None to four of different sizes; now and then one in slices, or one that has no memory but the machine's."""
    sizes = [mix.choice((6.0, 8.0, 12.0, 16.0, 24.0)) for _ in range(mix.randrange(5))]
    if mix.random() < 0.15:
        return [gpu(0, ram, unified=True), *(gpu(1, size) for size in sizes[:1])]
    cards = [gpu(index, size) for index, size in enumerate(sizes)]
    if cards and mix.random() < 0.2:
        whole = cards.pop()
        parts = [gpu(whole.index, whole.total / GIB / 2, slice_of=whole.id.name, part=part) for part in range(2)]
        cards += parts
    return cards


def draw_world(seed: int) -> World:
    """A machine and six models of all kinds; seed by seed they fit it well, badly or not at all."""
    mix = random.Random(f"world {seed}")
    ram = mix.choice((16.0, 32.0))
    shapes = {name: draw_shape(mix) for name in ("tiny", "small", "twin", "base", "large", "vast")}
    specs = (
        spec("tiny", devices=mix.choice(("auto", "cpu"))),
        spec("small", backends=(ALPHA, BETA)),
        spec("twin", run=RunMode.ALWAYS, priority=40),
        spec("base", run=RunMode.ALWAYS, pinned=True, priority=60),
        spec("large", partial=mix.random() < 0.3, gpu_layers=mix.choice(("auto", "auto", "all", 5))),
        spec("vast", backends=mix.choice(((ALPHA, BETA), (ALPHA,))), priority=70, partial=mix.random() < 0.2),
    )
    sizes = {"tiny": 0.5, "small": 2.0, "twin": 1.5, "base": 1.0, "large": mix.choice((5.0, 9.0)), "vast": mix.choice((12.0, 20.0))}
    budget = Budget(
        gpu_default=DeviceBudget(limit=Share(mix.choice((95, 100))), reserve=Bytes(mix.choice((0, GIB // 2)))),
        gpus={"1": DeviceBudget(limit=Bytes(5 * GIB))} if mix.random() < 0.2 else {},
    )
    desired = DesiredState(models={one.name: one for one in specs}, budget=budget, generation=1)
    world = World(
        desired,
        {ModelName(name): size for name, size in sizes.items()},
        total=ram,
        gpus=draw_gpus(mix, ram),
        shapes={ModelName(name): shape for name, shape in shapes.items()},
    )
    world.machine.tells_sizes = mix.random() < 0.7
    return world


def draw_shape(mix: random.Random) -> Shape:
    return Shape(
        layers=mix.choice((0, 4, 12, 33)),
        fixed=mix.choice((0.2, 0.8)),
        host=mix.choice((0.0, 0.3, 2.0)),
        output=mix.choice((1.0, 3.0)),
    )


class DeviceDriver(Driver):
    """Draws from one seed the machine, and what happens to it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, draw_world(seed))

    def step(self) -> None:
        draw = self.mix.random()
        if draw < 0.80:
            super().step()
        elif draw < 0.84:
            self.world.edit(self._model(), **self.mix.choice(DEVICE_EDITS))
        elif draw < 0.88:
            self._ask_for_a_loan()
        elif draw < 0.92:
            faults.end_a_loan(self.world, self.mix.randrange(10))
        else:
            self._device_fault()

    def _ask_for_a_loan(self) -> None:
        if len(self.world.loans) < 4:
            device = self.mix.choice(("auto", "auto", "host", "0", "1", "GPU-1"))
            self.world.borrow(self.mix.choice(LOANS), device, named=self.mix.random() < 0.7)

    def _device_fault(self) -> None:
        world, mix = self.world, self.mix
        device = mix.choice(list(world.machine.cards))
        match mix.randrange(8):
            case 0:
                faults.lose_device(world, device)
            case 1:
                faults.lose_driver(world)
            case 2 | 3 | 4:
                faults.see_again(world)
            case 5 | 6:
                faults.foreign_memory(world, mix.choice((0.0, 0.0, 1.0, 8.0)), device, polite=mix.random() < 0.5)
            case _:
                faults.slow_release(world, mix.choice((0.0, 0.3, 5.0, 15.0)))


def show_world() -> World:
    """Two GPUs of 24 GiB and eight models of 5 to 20 GiB, each loaded at 4 GiB a second."""
    sizes = {"m05": 5.0, "m06": 6.0, "m08": 8.0, "m10": 10.0, "m12": 12.0, "m14": 14.0, "m17": 17.0, "m20": 20.0}
    specs = [spec(name, context=0, idle_timeout=Seconds(600)) for name in sizes]
    world = World(
        DesiredState(models={one.name: one for one in specs}),
        {ModelName(name): size for name, size in sizes.items()},
        total=64.0,
        gpus=(gpu(0, 24.0), gpu(1, 24.0)),
        shapes={ModelName(name): Shape(layers=33, fixed=0.6, host=0.3) for name in sizes},
    )
    for name, size in sizes.items():
        faults.loads_in(world, ModelName(name), size / 4)
    return world
