"""What waits to be written to the registry: gathered on the event loop, written by a thread in one transaction."""

from __future__ import annotations

from dataclasses import dataclass, field

from offloadd.state.found import Found
from offloadd.state.history import End, Load, Usage
from offloadd.state.ids import ModelName
from offloadd.state.launch import Footprint

MAX_WAITING = 10_000
"""Loads, ends and days that are kept while nothing can be written; the oldest go first."""


@dataclass(slots=True)
class Batch:
    """Everything since the last write."""

    footprints: dict[str, Footprint] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    """Footprint keys of an older offloadd, and what they are now."""
    loads: list[Load] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    usage: dict[tuple[ModelName, str], Usage] = field(default_factory=dict)
    found: dict[str, Found | None] = field(default_factory=dict)
    """Models on disk that are new or have changed, by path; None for one that is gone."""

    def __bool__(self) -> bool:
        return bool(self.footprints or self.moved or self.loads or self.ends or self.usage or self.found)

    def count(self, model: ModelName, day: str, usage: Usage) -> None:
        """Add to the model's day."""
        self.usage[model, day] = self.usage.get((model, day), Usage()).plus(usage)

    def before(self, later: Batch) -> Batch:
        """This one, which could not be written, with what has come since. Bounded."""
        whole = Batch(
            footprints={
                **self.footprints,
                **{key: _higher(self.footprints.get(key), new) for key, new in later.footprints.items()},
            },
            moved={**self.moved, **later.moved},
            loads=[*self.loads, *later.loads][-MAX_WAITING:],
            ends=[*self.ends, *later.ends][-MAX_WAITING:],
            usage=dict(self.usage),
            found={**self.found, **later.found},
        )
        for (model, day), usage in later.usage.items():
            whole.count(model, day, usage)
        whole.usage = dict(list(whole.usage.items())[-MAX_WAITING:])
        return whole


def _higher(known: Footprint | None, new: Footprint) -> Footprint:
    return new if known is None or new.peak >= known.peak else known
