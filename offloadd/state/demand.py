"""The demand side: what requests wait for, and which instances they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offloadd.state.ids import InstanceId, ModelName
from offloadd.units import Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Requests queued for one model; `oldest` is when the first of them arrived."""

    count: int
    oldest: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One reading of the LeaseBook. A model or instance that is absent has none."""

    waiting: Mapping[ModelName, Waiting] = field(default_factory=dict)
    leases: Mapping[InstanceId, int] = field(default_factory=dict)
    last_used: Mapping[ModelName, Instant] = field(default_factory=dict)
    """When a request for the model last arrived or ended."""
