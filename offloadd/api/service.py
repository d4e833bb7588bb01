"""What the service manager is told while we run: a line of status, that the scheduler progresses, begin and end of each reload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from offloadd.api.picture import ConfigStatus, Picture
from offloadd.state.actions import DeviceAccount, ModelState
from offloadd.state.ids import DeviceId, DeviceKind
from offloadd.systemd import Manager
from offloadd.units import Seconds, format_bytes

SPACING = Seconds(1)
"""Least time between two looks: a burst of changes costs one line."""
RESYNC = Seconds(20)
"""A look at least this often, and three times in the watchdog's time where there is one."""
_NAMED = 6
"""Models that the line names; of more it gives the number only."""


class Service:
    """Speaks to the manager for the daemon; idle where there is none."""

    def __init__(self, manager: Manager, look: Callable[[], Picture]) -> None:
        self._manager = manager
        self._look = look
        self._changed = asyncio.Event()
        self._said = ""
        self._stopping = False
        self._period = min(RESYNC, (manager.watchdog or 3 * RESYNC) / 3)

    def ready(self) -> None:
        """It listens."""
        self._manager.ready(status_line(self._look()))

    def changed(self) -> None:
        """Something may be different: look soon."""
        self._changed.set()

    def stopping(self, within: Seconds) -> None:
        """The end begins and takes at most so long."""
        self._stopping = True
        self._manager.stopping(within)
        self._changed.set()

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Around every reload: systemd waits for the READY that ends it, whatever came of it."""
        if self._stopping:
            yield
            return
        self._manager.reloading()
        try:
            yield
        finally:
            line = ""
            try:
                line = status_line(self._look())
            finally:
                self._manager.ready(line)

    async def attend(self) -> None:
        """Tell how it stands, then wait until it may stand otherwise.

        The watchdog is fed by a reconcile loop that progresses and by nothing else.
        """
        if not self._manager.address:
            await asyncio.Event().wait()
        self._changed.clear()
        picture = self._look()
        if picture.alive:
            self._manager.alive()
        line = ("stopping: " if self._stopping else "") + status_line(picture)
        if line != self._said and self._manager.status(line):
            self._said = line
        with suppress(TimeoutError):
            async with asyncio.timeout(self._period):
                await self._changed.wait()
        await asyncio.sleep(min(SPACING, self._period))


def status_line(picture: Picture) -> str:
    """Models and memory in one line; ahead of them the first thing that is wrong with the config, if it was refused."""
    parts = [_refusal(picture.config)] if not picture.config.attempt_ok else []
    if not picture.alive:
        parts.append("the scheduler does not progress")
    parts.append(_models(picture))
    parts.extend(_memory(picture, device, account) for device, account in picture.plan.accounts.items())
    waiting = sum(queue.count for queue in picture.demand.waiting.values())
    parts.extend([f"{waiting} waiting"] if waiting else [])
    return "; ".join(parts)


def _refusal(config: ConfigStatus) -> str:
    error = next((entry for entry in config.diagnostics if entry["severity"] == "error"), None)
    if error is None:
        return f"config refused: {config.message}"
    return f"config refused: {error['file']}:{error['line']}:{error['column']}: error: {error['message']}"


def _models(picture: Picture) -> str:
    """`2 of 3 models ready (coder, qwen), 1 loading`."""
    states: dict[ModelState, list[str]] = {}
    for name, decision in sorted(picture.plan.decisions.items()):
        states.setdefault(decision.state, []).append(name)
    ready = states.pop(ModelState.READY, [])
    states.pop(ModelState.OFF, None)
    count = len(picture.desired.models)
    named = f" ({', '.join(ready)})" if 0 < len(ready) <= _NAMED else ""
    others = "".join(f", {len(names)} {state}" for state, names in sorted(states.items()))
    return f"{len(ready)} of {count} model{'s' if count != 1 else ''} ready{named}{others}"


def _memory(picture: Picture, device: DeviceId, account: DeviceAccount) -> str:
    view = picture.observed.devices.get(device)
    name = str(device) if view is None or view.kind is DeviceKind.HOST else f"gpu{view.index}"
    return f"{name} {format_bytes(account.reserved)} of {format_bytes(account.limit)}"
