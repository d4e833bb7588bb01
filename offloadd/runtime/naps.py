"""An engine's sleep as its calls go: said here, judged by the planner, done by the instance whose state it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from offloadd.backends.base import Backend, CanSleep
from offloadd.state.desired import ModelSpec
from offloadd.state.launch import Endpoint, Naps, Placement, Probe, ProbeReply


class Sleeper:
    """Speaks to one engine that can sleep."""

    def __init__(
        self,
        backend: CanSleep,
        naps: Naps,
        endpoint: Endpoint,
        ask: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
    ) -> None:
        self._backend = backend
        self._naps = naps
        self._endpoint = endpoint
        self._ask = ask

    @property
    def level(self) -> int:
        """How deep it sleeps."""
        return self._naps.level

    async def fall_asleep(self) -> str:
        """Tell it to; empty when it says that it did, else why it did not."""
        return await self._tell(self._naps.sleep)

    async def wake_up(self) -> str:
        """The same for the way back."""
        return await self._tell(self._naps.wake)

    async def sleeps(self) -> bool | None:
        """Whether it sleeps by its own word; None when it does not say."""
        return self._backend.read_nap(await self._ask(self._endpoint, self._naps.asks))

    async def _tell(self, calls: Sequence[Probe]) -> str:
        for call in calls:
            reply = await self._ask(self._endpoint, call)
            if reply.status != 200:
                return f"{call.path}: {reply.error or f'status {reply.status}'}"
        return ""


def sleeper_of(
    backend: Backend,
    spec: ModelSpec,
    placement: Placement,
    endpoint: Endpoint,
    ask: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
) -> Sleeper | None:
    """Who speaks to an instance that was placed so that it can sleep; None where it was not, or its engine cannot."""
    naps = backend.naps(spec) if placement.asleep and isinstance(backend, CanSleep) else None
    return None if naps is None or not isinstance(backend, CanSleep) else Sleeper(backend, naps, endpoint, ask)
