"""The reconcile loop on a machine where nothing happens: `python bench/idle_cycles.py [MODELS] [CYCLES]`. The clock is virtual."""

from __future__ import annotations

import sys
import time

import psutil

from offloadd.runtime.reconciler import RESYNC, Reconciler
from offloadd.state.actions import Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import HOST_RAM, BackendName, DeviceKind, ModelName
from offloadd.state.launch import Candidate, ModelFacts, VramEstimate
from offloadd.state.observed import DeviceView, ObservedState
from offloadd.units import Bytes, Instant

GIB = 2**30
ENGINE = BackendName("llamacpp")


class Still:
    """A reconciler, on-demand models that nobody asks for, and a clock that is set forward by a resync with each cycle."""

    def __init__(self, models: int) -> None:
        names = [ModelName(f"model-{number:04}") for number in range(models)]
        specs = {name: ModelSpec(name=name, source=f"{name}.gguf", backends=(ENGINE,)) for name in names}
        need = VramEstimate(total=Bytes(GIB), basis="given")
        offer = Candidate(backend=ENGINE, facts=ModelFacts(identity="1"), fingerprint="now", estimate=need)
        ram = DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=Bytes(64 * GIB), free=Bytes(60 * GIB))
        observed = ObservedState(devices={HOST_RAM: ram}, candidates=dict.fromkeys(names, (offer,)))
        desired = DesiredState(models=specs)
        self._now = 1000.0
        self.actions = 0
        self._reconciler = Reconciler(
            clock=self, desired=lambda: desired, observed=lambda: observed, demand=Demand, apply=self._apply, woke_up=lambda: None
        )

    def now(self) -> Instant:
        """Virtual seconds."""
        return Instant(self._now)

    def wall(self) -> float:
        """The same."""
        return self._now

    def cycles(self, count: int) -> None:
        """So many cycles, each a resync after the one before."""
        for _ in range(count):
            self._now += RESYNC
            self._reconciler.cycle()

    def _apply(self, plan: Plan) -> None:
        self.actions += len(plan.actions)


def main(models: int = 100, cycles: int = 100_000) -> None:
    """Print what a cycle costs, and how memory stands before and after."""
    still, process = Still(models), psutil.Process()
    still.cycles(cycles // 100)
    held, begun = process.memory_info().rss, time.process_time()
    still.cycles(cycles)
    used = time.process_time() - begun
    grown = (process.memory_info().rss - held) / 1024
    share = used / cycles / RESYNC
    print(f"{models} models, {cycles} cycles: {used / cycles * 1000:.2f} ms each, {share:.4%} of a core at one in {RESYNC:g} s")
    print(f"memory {held / 2**20:.1f} MiB before, {grown:+.0f} KiB after")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
