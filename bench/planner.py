"""How long plan() takes, and how that grows: `python bench/planner.py`. Times are of this machine, in this run."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

from offloadd.plan.planner import plan
from offloadd.state.demand import Demand, Waiting
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, DeviceId, DeviceKind, InstanceId, ModelName
from offloadd.state.launch import Candidate, ModelFacts, Placement, VramEstimate
from offloadd.state.observed import DeviceView, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes, Instant

GIB = 2**30
NOW = Instant(10_000.0)
ENGINE = BackendName("llamacpp")
ROUNDS = 30
CASES = ((10, 1, 4), (100, 2, 20), (250, 4, 50), (500, 8, 100), (1000, 16, 200), (2000, 32, 400))


def world(models: int, gpus: int, instances: int) -> tuple[DesiredState, ObservedState, Demand]:
    """Cards of 80 GiB, models of 2 to 60 GiB in 40 layers; `instances` run, a third of them busy; one model in twenty is wanted."""
    chance = random.Random(models)
    cards = [DeviceId(LOCAL, f"GPU-{index:04}") for index in range(gpus)]
    free = dict.fromkeys(cards, 76 * GIB)
    specs: dict[ModelName, ModelSpec] = {}
    candidates: dict[ModelName, tuple[Candidate, ...]] = {}
    views: dict[InstanceId, InstanceView] = {}
    for number in range(models):
        name = ModelName(f"model-{number:05}")
        size = chance.choice((2, 5, 9, 20, 40, 60)) if len(views) >= instances else chance.choice((2, 4, 6))
        layers = (Bytes(size * GIB // 40),) * 40
        need = VramEstimate(total=Bytes(sum(layers) + GIB // 2), basis="drawn", layers=layers, fixed=Bytes(GIB // 2))
        specs[name] = ModelSpec(name=name, source=f"{name}.gguf", backends=(ENGINE,), priority=chance.choice((40, 50, 60)))
        candidates[name] = (Candidate(backend=ENGINE, facts=ModelFacts(identity="1"), fingerprint=name, estimate=need),)
        card = max(cards, key=lambda gpu: free[gpu])
        if len(views) < instances and free[card] >= need.total:
            free[card] -= need.total
            key = InstanceId(LOCAL, name, 1)
            views[key] = InstanceView(
                id=key,
                spec=specs[name],
                backend=ENGINE,
                fingerprint=name,
                placement=Placement(reserved={card: need.total}, gpus=(card,)),
                state=InstanceState.READY,
                since=Instant(NOW - 500),
                started_at=Instant(NOW - 520),
                ready_at=Instant(NOW - 500),
                last_sign=NOW,
                measured={card: need.total},
            )
    devices = {
        card: DeviceView(
            id=card, kind=DeviceKind.NVIDIA, name="80 GB", index=i, total=Bytes(80 * GIB), free=Bytes(free[card] + 4 * GIB)
        )
        for i, card in enumerate(cards)
    }
    devices[HOST_RAM] = DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=Bytes(512 * GIB), free=Bytes(400 * GIB))
    idle = [name for name in specs if InstanceId(LOCAL, name, 1) not in views]
    waiting = {name: Waiting(count=2, oldest=Instant(NOW - chance.random() * 30)) for name in idle[::20]}
    leases = dict.fromkeys(list(views)[::3], 1)
    used = {key.model: Instant(NOW - chance.random() * 500) for key in views}
    return (
        DesiredState(models=specs),
        ObservedState(instances=views, devices=devices, candidates=candidates),
        Demand(waiting=waiting, leases=leases, last_used=used),
    )


def timed(desired: DesiredState, observed: ObservedState, demand: Demand) -> list[float]:
    """Milliseconds of each of some plans."""
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        plan(desired, observed, demand, now=NOW)
        found.append((time.perf_counter() - begin) * 1000)
    return found


def main() -> None:
    """Print a table."""
    print(f"{'models':>7} {'devices':>8} {'instances':>10} {'waited for':>11} {'settled ms':>11} {'pressed ms':>11} {'actions':>8}")
    for models, gpus, instances in CASES:
        desired, observed, demand = world(models, gpus, instances)
        calm = replace(demand, waiting={})
        count = len(plan(desired, observed, demand, now=NOW).actions)
        quiet, pressed = (statistics.median(timed(desired, observed, each)) for each in (calm, demand))
        sizes = f"{models:>7} {gpus:>8} {len(observed.instances):>10} {len(demand.waiting):>11}"
        print(f"{sizes} {quiet:>11.2f} {pressed:>11.2f} {count:>8}")


if __name__ == "__main__":
    main()
