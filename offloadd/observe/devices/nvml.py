"""NVIDIA's cards and MIG slices, through one session with the driver that is kept open and opened again when it broke."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from offloadd.clock import Clock, SystemClock
from offloadd.errors import TemporaryError
from offloadd.observe.devices import nvml_calls as calls
from offloadd.observe.devices.nvml_calls import Nvml, NvmlError
from offloadd.observe.devices.nvml_reading import Reading
from offloadd.observe.devices.ram import Ram, read_ram
from offloadd.state.observed import DeviceView
from offloadd.units import Instant, Seconds

NO_DRIVER_WAIT = Seconds(60)
"""Between looks for a driver on a machine that has none."""
FIRST_WAIT = Seconds(1)
LONGEST_WAIT = Seconds(60)
"""Between attempts to open a session, doubling from the first to the longest."""
FIRST_REVIVAL = Seconds(15)
LONGEST_REVIVAL = Seconds(600)
"""While a card is lost: between new sessions, without which a card that was reset isn't seen. The other cards' models run on."""

_HINTS = {
    calls.VERSION_MISMATCH: "the driver was updated while it was loaded: reboot, or reload its kernel modules",
    calls.DRIVER_NOT_LOADED: "load the kernel module: modprobe nvidia",
    calls.GPU_IS_LOST: "look for its Xid in the kernel log; it needs a reset or a reboot",
    calls.RESET_REQUIRED: "nvidia-smi --gpu-reset, with nothing running on it",
}
_REVIVABLE = calls.CARD_LOST | {calls.UNKNOWN}


class NvmlReader:
    """NVIDIA's devices. Where there is no driver library there are none, without a word."""

    name = "nvidia"

    def __init__(self, *, clock: Clock | None = None, machine: Callable[[], Ram] = read_ram) -> None:
        self._clock = clock or SystemClock()
        self._machine = machine
        self._nvml = Nvml()
        self._is_open = False
        self._failure: NvmlError | None = None
        """Why there is no session now."""
        self._opening = _Backoff(FIRST_WAIT, LONGEST_WAIT)
        self._revival = _Backoff(FIRST_REVIVAL, LONGEST_REVIVAL)
        self._cards: dict[str, int] = {}
        """The index that each card had when it was last read, by UUID: so that one which is gone can be told from one unknown."""
        self._names: dict[str, str] = {}
        """The name of every card and slice ever read, by UUID."""
        self._is_short = False
        """Whether the latest reading lacks a card that a new session might bring back."""
        self._problems: Mapping[str, str] = {}
        self._versions: Mapping[str, str] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """Cards and slices that were left out and why, by UUID, or by `gpuN` where that was never read."""
        return self._problems

    @property
    def versions(self) -> Mapping[str, str]:
        """`driver`, `nvml` and `cuda` of the session; empty while there is none."""
        return self._versions

    def read(self) -> Sequence[DeviceView]:
        """Cards by index, and in place of a card in MIG mode its slices by slot.

        Raise TemporaryError when the driver is there and gives nothing; `retry_after` says when it is asked again.
        """
        if not self._connect():
            self._problems = {}
            return ()
        reading = Reading(self._nvml, self._machine)
        try:
            reading.take()
        except NvmlError as error:
            self._drop()
            raise self._failed(error) from None
        self._opening.reset()  # only now: a driver that opens sessions and answers nothing is given more time, too
        self._keep(reading)
        return tuple(reading.views)

    def close(self) -> None:
        """End the session; the next reading opens another one. It may hang, as any call."""
        if self._is_open:
            self._drop()

    def _connect(self) -> bool:
        """Have a session; False where there is no driver library. Raise TemporaryError when it can't be had now."""
        now = self._clock.now()
        if self._is_open and self._is_short and self._revival.due(now):
            self._revival.fail(now)
            self._drop()
        if self._is_open:
            return True
        if self._opening.due(now):
            return self._open()
        if self._failure is None or self._failure.code == calls.LIBRARY_NOT_FOUND:
            return False
        raise self._refusal(self._failure)

    def _open(self) -> bool:
        try:
            self._nvml.open()
            self._is_open = True
            self._versions = self._nvml.versions()
        except NvmlError as error:
            if self._is_open:
                self._drop()
            if error.code != calls.LIBRARY_NOT_FOUND:
                raise self._failed(error) from None
            self._failure = error
            self._opening.hold(self._clock.now(), NO_DRIVER_WAIT)
            return False
        self._failure = None
        return True

    def _drop(self) -> None:
        """Leave the session, whatever the driver says to that."""
        self._is_open = False
        self._versions = {}
        try:
            self._nvml.close()
        except NvmlError:
            pass

    def _failed(self, error: NvmlError) -> TemporaryError:
        self._failure = error
        self._opening.fail(self._clock.now())
        self._problems = {}  # of no single card: the exception is the problem
        return self._refusal(error)

    def _refusal(self, error: NvmlError) -> TemporaryError:
        wait = self._opening.left(self._clock.now())
        return TemporaryError(f"NVIDIA driver: {error.message}", retry_after=wait, hint=_HINTS.get(error.code, ""))

    def _keep(self, reading: Reading) -> None:
        """Take over what the reading found, and say which cards it lacks."""
        present = {uuid: index for index, uuid in reading.uuids.items()}
        missing = {uuid: index for uuid, index in self._cards.items() if uuid not in present}
        self._cards |= present
        self._names.update(reading.names)
        problems = {uuid: self._sentence(uuid, index, error) for uuid, (index, error) in reading.failures.items()}
        for index, error in reading.unopened.items():
            uuid = next((each for each, last in missing.items() if last == index), "")
            missing.pop(uuid, None)
            problems[uuid or f"gpu{index}"] = self._sentence(uuid, index, error)
        for uuid, index in missing.items():
            problems[uuid] = f"{self._label(uuid, index)} is no longer listed by the driver"
        self._problems = problems
        self._watch_for_revival(bool(missing) or any(error.code in _REVIVABLE for error in reading.errors()))

    def _watch_for_revival(self, is_short: bool) -> None:
        if not is_short:
            self._revival.reset()
        elif not self._is_short:
            self._revival.fail(self._clock.now())
        self._is_short = is_short

    def _label(self, uuid: str, index: int) -> str:
        return f"{self._names.get(uuid, 'NVIDIA GPU')} (gpu{index})"

    def _sentence(self, uuid: str, index: int, error: NvmlError) -> str:
        hint = _HINTS.get(error.code, "")
        return f"{self._label(uuid, index)}: {error.message}" + (f"; {hint}" if hint else "")


class _Backoff:
    """When to try next: waits double from the first to the longest."""

    def __init__(self, first: Seconds, longest: Seconds) -> None:
        self._first = first
        self._longest = longest
        self.reset()

    def reset(self) -> None:
        """It went well: the next time is any time, and the next wait the first again."""
        self._wait = self._first
        self._at = Instant(float("-inf"))

    def fail(self, now: Instant) -> None:
        """It went wrong: wait, and the next time longer."""
        self.hold(now, self._wait)
        self._wait = min(Seconds(self._wait * 2), self._longest)

    def hold(self, now: Instant, wait: Seconds) -> None:
        """Wait this long."""
        self._at = Instant(now + wait)

    def due(self, now: Instant) -> bool:
        """Whether the wait is over."""
        return now >= self._at

    def left(self, now: Instant) -> Seconds:
        """What is left of the wait; 0 when it is over."""
        return Seconds(max(0.0, self._at - now))
