"""One request's hold on an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from offloadd.state.ids import BackendName, InstanceId
from offloadd.state.launch import Endpoint, EngineApi
from offloadd.units import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A ready instance, as the proxy needs to know it."""

    instance: InstanceId
    backend: BackendName
    endpoint: Endpoint
    slots: int
    sign: Callable[[], None]
    """To be called when bytes came from it."""
    cancels_only_streams: bool = False
    """Whether it works on for a client that has left, unless it answers with a stream."""
    api: EngineApi = field(default_factory=EngineApi)
    """What it speaks."""
    starts: dict[str, bytes] = field(default_factory=dict, compare=False)
    """How the head of a request to it begins, by path; filled by whoever writes them."""
    kept: str = field(default="", init=False, compare=False)
    """Under which its connections are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", place_of(self.endpoint))


def place_of(endpoint: Endpoint) -> str:
    """Under which connections to it are kept."""
    return f"{endpoint.host}:{endpoint.port}"


class Lease(msgspec.Struct, eq=False, kw_only=True):  # made once a request
    """One request's hold on an instance, from grant to last byte."""

    host: Host
    why: str
    waited: Seconds
    told: Callable[[], object] | None = None
    """To be called when it is revoked."""
    future: asyncio.Future[str] | None = None
    """What `revoked` is, once somebody has asked for it."""
    died: bool = False
    """Whether it is going away because it died by itself."""
    beside: bool = False
    """It takes no slot and keeps nothing loaded."""
    crowded: bool = False
    """Whether another request was ever on the instance at the same time."""
    lingers: bool = False
    """Whether the engine works on for a client that has left, so that the lease outlives its handler."""
    hedge_after: Seconds | None = None
    """After so long without a byte another instance is asked too, where the config wants that."""
    over: asyncio.Future[None] | None = None
    """Where the instance works on for a client that has left: done when it has stopped. Until then the lease counts."""

    @property
    def revoked(self) -> asyncio.Future[str]:
        """Done, with the reason, when the instance is going away and the request must end."""
        if self.future is None:
            self.future = asyncio.get_running_loop().create_future()
        return self.future

    @property
    def is_revoked(self) -> bool:
        """Whether that is so by now."""
        return self.future is not None and self.future.done()

    def revoke(self, why: str, *, died: bool) -> None:
        """The instance is going away."""
        if self.is_revoked:
            return
        self.died = died
        self.revoked.set_result(why)
        if self.told is not None:
            self.told()
