"""How the daemon begins: it takes over what an earlier one left, and looks at what cannot wait until it serves, at no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offloadd.backends.base import Backend
from offloadd.catalog import Catalog
from offloadd.chronicle import Chronicle
from offloadd.observe.processes import holds_port
from offloadd.observe.snapshot import Observer
from offloadd.registry.lives import LifeBook
from offloadd.rounds import Rounds
from offloadd.runtime.executor import Executor
from offloadd.runtime.launchers.local import LocalLauncher
from offloadd.runtime.orphans import take_up
from offloadd.state.desired import DesiredState, Engine
from offloadd.state.life import Life


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What there is to begin from."""

    backends: Mapping[str, Backend]
    config: Callable[[], DesiredState]
    """As it is in force."""
    lives: LifeBook
    launcher: LocalLauncher
    executor: Executor
    chronicle: Chronicle
    catalog: Catalog
    observer: Observer
    rounds: Rounds

    async def run(self) -> None:
        """Until requests can be let in."""
        adopted = await self._take_over()
        shelf = await self.chronicle.start()
        self.catalog.begin(shelf)
        self.observer.know(self.chronicle.recorder.footprints)
        if not (adopted and shelf.present):
            # Servers of models that are nowhere to be found would be stopped: it is looked first, or remembered.
            await self.catalog.discovery.first()
            self.catalog.publish()
        if adopted:
            # They could serve already: what else there is can be looked at meanwhile, and is unknown to the planner until then.
            self.rounds.look_soon()
        else:
            await self.rounds.look_ahead(self.config())

    async def _take_over(self) -> int:
        """Processes of an earlier daemon that was killed: what we can vouch for serves on, and all else must not keep memory.

        How many there are.
        """
        desired, boot = self.config(), self.launcher.boot
        orphans = await take_up(
            self.lives.lives(),
            lives=self.lives,
            launcher=self.launcher,
            holds_port=lambda life, pid: bool(life.stop_command) or holds_port(pid, life.endpoint.port),
            startable=lambda life: life.backend in desired.engines and desired.engines[life.backend].adapter in self.backends,
            boot=boot,
            engine_of=lambda life: desired.engines.get(life.backend) or _former_engine(life),
        )
        self.executor.remember(self.lives.exits(boot))
        self.executor.take_over(orphans, desired.models)
        return len(orphans)


def _former_engine(life: Life) -> Engine:
    """One that the config does not have any more, as far as ending its servers goes."""
    return Engine(name=life.backend, adapter="", user=life.user, group=life.group)
