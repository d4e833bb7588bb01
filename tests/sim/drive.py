"""A long run of one seed: at each step one thing happens to the world, and the planner answers under every safety property."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from offloadd.state.actions import Action, Plan
from offloadd.state.desired import Replicas, RunMode
from offloadd.state.ids import ModelName
from offloadd.units import Seconds
from tests.sim import faults
from tests.sim.properties import LIVENESS, check_cycle
from tests.sim.world import ALPHA, BETA, Fate, Process, World, small_world, spec

EDITS: Sequence[dict[str, object]] = (
    {"context": 4096},
    {"context": 8192},
    {"context": 16384},
    {"args": ("--fast",)},
    {"args": ()},
    {"priority": 30},
    {"priority": 50},
    {"priority": 70},
    {"pinned": True},
    {"pinned": False},
    {"run": RunMode.ALWAYS},
    {"run": RunMode.ON_DEMAND},
    {"run": RunMode.NEVER},
    {"backends": (ALPHA,)},
    {"backends": (BETA,)},
    {"backends": (ALPHA, BETA)},
    {"replicas": Replicas(min=2, max=2)},
    {"replicas": Replicas()},
    {"replicas": Replicas(min=0, max=3)},
    {"replicas": Replicas(min=1, max=2)},
    {"idle_timeout": Seconds(5)},
    {"idle_timeout": Seconds(90)},
    {"idle_timeout": Seconds(0)},
    {"start_timeout": Seconds(8)},
    {"start_timeout": Seconds(60)},
    {"drain_timeout": Seconds(3)},
    {"stop_timeout": Seconds(1)},
)
"""Changes of one model that a config reload may bring."""
FATES = tuple(Fate)
SIM_SPANS = (0.05, 0.3, 1.0, 4.0, 15.0, 60.0)


def some_of(actions: Sequence[Action], mix: random.Random) -> list[Action]:
    """A part of them, in any order; the rest is lost."""
    chosen = [action for action in actions if mix.random() < 0.6]
    mix.shuffle(chosen)
    return chosen


def _leak(world: World, process: Process) -> None:
    faults.leak(world, process, 0.2)


class Driver:
    """Draws what happens from one seed."""

    def __init__(self, seed: int, world: World | None = None) -> None:
        self.mix = random.Random(seed)
        self.world = world or small_world()

    def run(self, steps: int, *, replan_every: int = 10, calm_every: int = 1000) -> None:
        """`steps` things happen; every now and then faults stop until the world has settled."""
        for number in range(1, steps + 1):
            self.step()
            dies = self.mix.random() < 0.01
            if dies or self.mix.random() < 0.9:  # else a cycle is skipped
                lossy = dies or self.mix.random() < 0.15
                check_cycle(self.world, replan=number % replan_every == 0, actions=self._lose if lossy else None)
            if dies:  # between two effects of the plan that it was carrying out
                faults.kill_the_daemon(self.world, forgets=self.mix.random() < 0.5)
            if number % calm_every == 0:
                faults.stop_all(self.world)
                for holds in LIVENESS:
                    holds(self.world)

    def run_up_to(self, number: int) -> None:
        """So many things happen, and each but the last is answered by a planner cycle that is carried out whole."""
        for done in range(1, number + 1):
            self.step()
            if done < number:
                check_cycle(self.world, replan=False)

    def plans(self, steps: int) -> Iterator[tuple[int, int]]:
        """After which of so many steps of such a run there is something to do, and how many actions."""
        for number in range(1, steps + 1):
            self.step()
            if actions := check_cycle(self.world, replan=False).plan.actions:
                yield number, len(actions)

    def _lose(self, made: Plan) -> list[Action]:
        return some_of(made.actions, self.mix)

    def step(self) -> None:
        """One thing happens: mostly time passes or requests come, now and then something goes wrong."""
        mix, draw = self.mix, self.mix.random()
        if draw < 0.5:
            self.world.advance(mix.choice(SIM_SPANS))
        elif draw < 0.78:
            self._request()
        elif draw < 0.82:
            faults.leave(self.world, mix.randrange(100))
        elif draw < 0.86:
            self._edit()
        elif draw < 0.87:
            self.world.wish(self._model(), load=mix.random() < 0.5)
        elif draw < 0.93:
            self._process_fault()
        else:
            self._machine_fault()

    def _model(self) -> ModelName:
        return self.mix.choice(list(self.world.desired.models))

    def _request(self) -> None:
        silent = self.mix.random() < 0.05
        self.world.arrive(self._model(), runs_for=80.0 if silent else self.mix.choice((0.5, 3.0, 20.0)), silent=silent)

    def _edit(self) -> None:
        models = self.world.desired.models
        if self.mix.random() < 0.15 and len(models) > 3:
            gone = self._model()
            self.world.reload([one for one in models.values() if one.name != gone])
        elif self.mix.random() < 0.3:
            missing = [name for name in self.world.sizes if name not in models]
            self.world.reload([*models.values(), *(spec(name) for name in missing[:1])])
        else:
            self.world.edit(self._model(), **self.mix.choice(EDITS))

    def _process_fault(self) -> None:
        world, mix = self.world, self.mix
        model = self._model()
        if world.processes and mix.random() < 0.4:
            process = mix.choice(list(world.processes.values()))
            mix.choice((faults.crash, faults.crash, faults.hang, faults.hang, _leak))(world, process)
        elif mix.random() < 0.4:
            faults.behave(world, model)
        elif mix.random() < 0.1:
            faults.run_out_of_memory(world, model, mix.choice((1.1, 1.3)))
        elif mix.random() < 0.1:
            faults.leave_workers_behind(world, model, mix.choice((0.5, 5.0)))
        elif mix.random() < 0.5:
            faults.next_ones(world, model, mix.choice(FATES), load=mix.choice((0.5, 5.0, 30.0)))
        else:
            faults.crash_when_ready(world, model, mix.choice((0.1, 20.0)))

    def _machine_fault(self) -> None:
        world, mix = self.world, self.mix
        model = self._model()
        match mix.randrange(10):
            case 0:
                faults.lose_device(world)
            case 1:
                faults.lose_facts(world, model)
            case 2 | 3 | 4:
                faults.see_again(world)
            case 5:
                faults.foreign_memory(world, mix.choice((0.0, 0.0, 2.0, 9.0)))
            case 6:
                faults.slow_release(world, mix.choice((0.0, 0.3, 5.0)))
            case 7:
                (faults.damage_file if mix.random() < 0.3 else faults.replace_file)(world, model)
            case 8:
                faults.ignore_term(world, model)
            case _:
                faults.take_less(world, model, mix.choice((0.2, 0.8)))
