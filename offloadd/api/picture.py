"""What the control plane is shown: the three pictures and the latest plan, at one instant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offloadd.api.meters import Meters
from offloadd.config.discovered import Shelved
from offloadd.state.actions import Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.history import History, Usage
from offloadd.state.ids import InstanceId, ModelName
from offloadd.state.observed import ObservedState, Signal
from offloadd.units import Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that an operator should know: `what`, since when (Unix seconds), and what to do."""

    what: str
    since: float
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigStatus:
    """The config in force and the last attempt to change it."""

    generation: int
    applied_wall: float
    attempt_wall: float
    attempt_ok: bool
    message: str
    """Why the last attempt was refused, as text with places; empty when it was not."""
    diagnostics: Sequence[Mapping[str, str | int]]
    """Of the last attempt."""
    shown: Mapping[str, object]
    """The config in force as written, secrets hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One reading of everything."""

    now: Instant
    wall: float
    """Unix seconds at `now`."""
    started_wall: float
    desired: DesiredState
    observed: ObservedState
    demand: Demand
    plan: Plan
    config: ConfigStatus
    problems: Iterable[Problem]
    alive: bool
    """Whether the reconcile loop makes progress."""
    shelf: Mapping[ModelName, Shelved] = field(default_factory=dict)
    """Models on disk that no entry of the config is about, served or not."""
    totals: Mapping[ModelName, Usage] = field(default_factory=dict)
    """What each model ever did."""
    signals: Mapping[InstanceId, Signal] = field(default_factory=dict)
    """How busy engines said that they are, a moment ago."""

    def wall_of(self, instant: Instant) -> float:
        """Unix seconds of a monotonic instant."""
        return self.wall - (self.now - instant)


class Control(Protocol):
    """What the control plane can see and ask for; `control.py` joins it."""

    @property
    def meters(self) -> Meters:
        """What was counted since the start."""
        ...

    def look(self, *, closely: bool = False) -> Picture:
        """One reading of everything; `closely` by somebody who wants engines to be asked how busy they are from now on."""
        ...

    async def reload(self) -> Picture:
        """Read the config again and apply it if it is good; the picture after it."""
        ...

    async def history(self, model: ModelName) -> History:
        """What one model did."""
        ...

    def reload_soon(self) -> None:
        """The same, not waited for."""
        ...
