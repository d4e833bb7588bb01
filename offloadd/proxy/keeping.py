"""How long clients want models to stay: Ollama's `keep_alive`, as another `idle_timeout` for the instances that are there."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from offloadd.state.desired import DesiredState
from offloadd.state.ids import InstanceId, ModelName
from offloadd.units import Seconds

_AT_ONCE = Seconds(0.001)
"""An idle_timeout of 0 means never; this one is over as soon as the last request is."""
_NEVER = Seconds(0)


@dataclass(frozen=True, slots=True)
class _Wish:
    idle_timeout: Seconds
    instances: frozenset[InstanceId]
    """It ends with the last of them: the next load of the model is the config's again."""


class KeepBook:
    """The latest wish for each model."""

    def __init__(self) -> None:
        self._wishes: dict[ModelName, _Wish] = {}

    def wish(self, model: ModelName, stay: Seconds, instances: Iterable[InstanceId]) -> None:
        """From now on: `stay` seconds after the last request, 0 for at once, infinite for ever."""
        found = frozenset(instances)
        idle = _NEVER if math.isinf(stay) else max(stay, _AT_ONCE)
        if found:
            self._wishes[model] = _Wish(idle, found)

    def applied_to(self, desired: DesiredState, live: Container[InstanceId]) -> DesiredState:
        """The config with the wishes that still hold; wishes whose instances have ended are forgotten."""
        if not self._wishes:
            return desired
        kept = {name: wish for name, wish in self._wishes.items() if any(key in live for key in wish.instances)}
        self._wishes = kept
        models = {
            name: replace(spec, idle_timeout=kept[name].idle_timeout) if name in kept else spec
            for name, spec in desired.models.items()
        }
        return replace(desired, models=models)
