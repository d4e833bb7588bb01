"""The named faults: each is one thing that goes wrong, or that someone does, at an unlucky moment."""

from __future__ import annotations

from dataclasses import replace

from offloadd.state.ids import HOST_RAM, DeviceId, ModelName
from offloadd.state.observed import InstanceState
from tests.sim.machine import GIB
from tests.sim.world import Fate, Nap, Process, Script, World


def crash(world: World, process: Process) -> None:
    """Its process dies, whatever it is doing."""
    if not process.gone:
        world.crash(process, "killed by SIGSEGV")


def hang(world: World, process: Process) -> None:
    """It keeps its port and its memory, and answers nothing from now on."""
    world.hang(process)


def next_ones(world: World, model: ModelName, fate: Fate, *, load: float = 5.0) -> None:
    """Whatever is started of the model from now on meets this fate."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), fate=fate, load=load)


def loads_in(world: World, model: ModelName, seconds: float) -> None:
    """Its next processes load this long, and serve."""
    next_ones(world, model, Fate.SERVES, load=seconds)


def crash_when_ready(world: World, model: ModelName, after: float) -> None:
    """Its next processes load, serve for a while, and die."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), fate=Fate.SERVES, crash_after=after)


def ignore_term(world: World, model: ModelName) -> None:
    """Its next processes end only when they are killed."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), ignores_term=True)


def sleep_so(world: World, model: ModelName, nap: Nap) -> None:
    """Whatever is put to sleep of the model from now on fares like this."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), nap=nap)


def take_less(world: World, model: ModelName, share: float) -> None:
    """Its next processes allocate only a part of what they were promised."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), takes=share)


def run_out_of_memory(world: World, model: ModelName, needs: float) -> None:
    """Its next processes need this multiple of what is predicted."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), needs=needs)


def leave_workers_behind(world: World, model: ModelName, seconds: float) -> None:
    """Its next processes fork workers that hold the memory after their end, until they are found and killed."""
    world.scripts[model] = replace(world.scripts.get(model, Script()), leaves=seconds)


def leak(world: World, process: Process, share: float) -> None:
    """It grows beyond what it was promised."""
    world.leak(process, share)


def behave(world: World, model: ModelName) -> None:
    """Its next processes do what they should."""
    world.scripts.pop(model, None)


def damage_file(world: World, model: ModelName) -> None:
    """The file's content is replaced by one that no engine can load."""
    world.files[model] = world.files.get(model, 0) + 1
    world.broken_files.add((model, world.files[model]))


def replace_file(world: World, model: ModelName) -> None:
    """The file's content is replaced by a good one."""
    world.files[model] = world.files.get(model, 0) + 1


def foreign_memory(world: World, gib: float, device: DeviceId = HOST_RAM, *, polite: bool = False) -> None:
    """Programs that are not ours use this much memory from now on; never more than there is, nor, when polite, what is promised."""
    card = world.machine.cards[device]
    spare = world.machine.balance(device) - (world.due(device) if polite else 0)
    card.foreign = max(0, min(int(gib * GIB), card.foreign + spare))
    if world.machine.balance(device) < world.due(device):
        for each in world.machine.pool(device):
            each.robbed = True


def slow_release(world: World, lag: float) -> None:
    """Memory of ended processes shows as used for this long."""
    world.lag = lag


def lose_device(world: World, device: DeviceId = HOST_RAM) -> None:
    """The reading of one memory fails."""
    world.machine.cards[device].lost = True


def lose_driver(world: World) -> None:
    """No GPU can be read."""
    world.machine.driver_lost = True


def lose_facts(world: World, model: ModelName) -> None:
    """The model's files cannot be looked at now."""
    world.blind_models.add(model)


def see_again(world: World) -> None:
    """Every reading succeeds again."""
    world.machine.driver_lost = False
    for card in world.machine.cards.values():
        card.lost = False
    world.blind_models.clear()


def leave(world: World, index: int) -> None:
    """One of the clients goes away, waiting or served."""
    if world.requests:
        world.cancel(world.requests[index % len(world.requests)])


def end_a_loan(world: World, index: int) -> None:
    """One of the borrowers is done, or waits no longer."""
    names = sorted(world.loans)
    if names:
        world.give_back(names[index % len(names)])


def stop_all(world: World) -> None:
    """No fault from now on: what runs well stays well, what hangs still hangs, and damaged files stay damaged."""
    see_again(world)
    world.scripts.clear()
    world.lag = 0.3
    for card in world.machine.cards.values():
        card.foreign = 0
    for process in world.processes.values():
        process.script = replace(process.script, crash_after=None, ignores_term=False)
        if process.state in (InstanceState.STARTING, InstanceState.LOADING) and process.script.fate is not Fate.NEVER_READY:
            process.script = replace(process.script, fate=Fate.SERVES)


def kill_the_daemon(world: World, *, forgets: bool = False) -> None:
    """SIGKILL, and a new daemon that finds what is there."""
    world.daemon_dies(forgets=forgets)
