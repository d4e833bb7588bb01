"""The demand side: what requests wait for, and which instances they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from offloadd.state.ids import BackendName, DeviceId, InstanceId, ModelName
from offloadd.units import Bytes, Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Requests queued for one model; `oldest` is when the first of them arrived."""

    count: int
    oldest: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """Memory that a person takes out of the budget for a program of their own, until they give it back."""

    id: str
    size: Bytes
    device: str = "auto"
    """A GPU by index or UUID, `host`, or `auto`: the GPU with the best fit, RAM where there is none."""
    since: Instant
    """When it was asked for."""
    why: str = ""
    """What it is for, in the borrower's words."""
    granted: Mapping[DeviceId, Bytes] | None = None
    """Where the memory lies; None while it is waited for."""
    measured: Mapping[DeviceId, Bytes] = field(default_factory=dict)
    """What the borrower's processes have taken of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an operator asked for by hand. It wins over the config until that is applied again.

    `load` keeps the model loaded as `run: always` does. Else the instances up to `newest` leave, and the model is on-demand.
    """

    load: bool
    since: Instant
    newest: int = 0
    """Highest number that an instance of the model had at `since`: those above it came later, be it in the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One reading of the LeaseBook. A model or instance that is absent has none."""

    waiting: Mapping[ModelName, Waiting] = field(default_factory=dict)
    leases: Mapping[InstanceId, int] = field(default_factory=dict)
    last_used: Mapping[ModelName, Instant] = field(default_factory=dict)
    """When a request for the model last arrived or ended."""
    named: Mapping[ModelName, Mapping[BackendName, Instant]] = field(default_factory=dict)
    """When a request last asked for one engine of the model by its name."""
    waiting_for: Mapping[ModelName, frozenset[BackendName]] = field(default_factory=dict)
    """Engines that waiting requests ask for by name."""
    idle_since: Mapping[InstanceId, Instant] = field(default_factory=dict)
    """When the last request that an instance held ended; absent when it never held one, or holds one now."""
    loans: Mapping[str, Loan] = field(default_factory=dict)
    wishes: Mapping[ModelName, Wish] = field(default_factory=dict)
    forgiven: Mapping[ModelName, Instant] = field(default_factory=dict)
    """Failures of a model up to this instant were cleared by hand."""
