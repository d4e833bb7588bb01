"""Names of things. A device and an instance belong to a host, also where there is only one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

HostId = NewType("HostId", str)
ModelName = NewType("ModelName", str)
BackendName = NewType("BackendName", str)

LOCAL = HostId("local")


class DeviceKind(StrEnum):
    """What a memory is."""

    HOST = "host"
    NVIDIA = "nvidia"
    AMD = "amd"


@dataclass(frozen=True, slots=True, order=True)
class DeviceId:
    """A memory that instances share: a GPU by its UUID, or `host` for the machine's RAM."""

    host: HostId
    name: str

    def __str__(self) -> str:
        return self.name if self.host == LOCAL else f"{self.host}/{self.name}"


class InstanceId(NamedTuple):
    """One launch of a model's server. `number` grows with every launch of the model, from 1.

    A tuple, because every request looks several things up by it, and a tuple is hashed without a call.
    """

    host: HostId
    model: ModelName
    number: int

    def __str__(self) -> str:
        name = f"{self.model}-{self.number}"
        return name if self.host == LOCAL else f"{self.host}/{name}"


HOST_RAM = DeviceId(LOCAL, "host")
