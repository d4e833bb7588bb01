"""nvidia-ml-py with types, one kind of error, and nothing that needs a driver before `open`. Every call blocks and may hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, NewType, TypeVar

from offloadd.errors import OffloaddError

T = TypeVar("T")

Handle = NewType("Handle", object)

UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NOT_FOUND = 6
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
VERSION_MISMATCH = 18
ARGUMENT_VERSION_MISMATCH = 25
UNKNOWN = 999

NOT_OFFERED = frozenset({NOT_SUPPORTED, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH})
"""This hardware or this driver doesn't have the call; nothing is wrong."""
SESSION_LOST = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, VERSION_MISMATCH})
"""The driver is gone or is another one now: open a new session."""
CARD_LOST = frozenset({GPU_IS_LOST, RESET_REQUIRED})
"""This card is gone until it is reset."""


class NvmlError(OffloaddError):
    """A call failed; `code` is NVML's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Memory(NamedTuple):
    """Bytes; `free` is what a new allocation can get."""

    total: int
    free: int


class Nvml:
    """The calls that readings need. Each raises NvmlError."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None

    def open(self) -> None:
        """Begin a session: load the library, once per process, and connect to the driver."""
        self._call("nvmlInit")

    def close(self) -> None:
        """End the session. The library stays loaded."""
        self._call("nvmlShutdown")

    def versions(self) -> Mapping[str, str]:
        """`driver`, `nvml` and the newest `cuda` that the driver runs; without those that can't be told."""
        cuda = self.maybe(lambda: int(self._call("nvmlSystemGetCudaDriverVersion_v2")))
        found = {
            "driver": self.maybe(lambda: str(self._call("nvmlSystemGetDriverVersion"))),
            "nvml": self.maybe(lambda: str(self._call("nvmlSystemGetNVMLVersion"))),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        }
        return {name: version for name, version in found.items() if version}

    def count(self) -> int:
        """Number of cards; their indexes are 0 to below it, in the order of their PCI addresses."""
        return int(self._call("nvmlDeviceGetCount"))

    def card(self, index: int) -> Handle:
        """A card by its index."""
        return Handle(self._call("nvmlDeviceGetHandleByIndex", index))

    def slices(self, card: Handle) -> Iterator[Handle]:
        """The MIG slices of a card, by slot; slots may have gaps."""
        for slot in range(int(self._call("nvmlDeviceGetMaxMigDeviceCount", card))):
            try:
                yield Handle(self._call("nvmlDeviceGetMigDeviceHandleByIndex", card, slot))
            except NvmlError as error:
                if error.code not in (NOT_FOUND, INVALID_ARGUMENT):
                    raise

    def is_sliced(self, card: Handle) -> bool:
        """Whether MIG is on now, so that only slices can be used."""
        mode = self.maybe(lambda: self._call("nvmlDeviceGetMigMode", card))
        return mode is not None and int(mode[0]) == 1

    def uuid(self, device: Handle) -> str:
        """`GPU-…` of a card, `MIG-…` of a slice."""
        return str(self._call("nvmlDeviceGetUUID", device))

    def name(self, device: Handle) -> str | None:
        """The product's name; None when not known."""
        return self.maybe(lambda: str(self._call("nvmlDeviceGetName", device)))

    def memory(self, device: Handle) -> Memory:
        """Its memory; NOT_SUPPORTED where it shares the machine's. Older drivers have only the first version of the call."""
        try:
            info = self._call("nvmlDeviceGetMemoryInfo", device, version=self._load().nvmlMemory_v2)
        except NvmlError as error:
            if error.code not in NOT_OFFERED:
                raise
            info = self._call("nvmlDeviceGetMemoryInfo", device)
        return Memory(int(info.total), int(info.free))

    def compute_processes(self, device: Handle) -> dict[int, int | None]:
        """Bytes by pid of the processes that compute; None where the driver doesn't tell."""
        return self._processes("nvmlDeviceGetComputeRunningProcesses", device)

    def graphics_processes(self, device: Handle) -> dict[int, int | None]:
        """Bytes by pid of the processes that draw; None where the driver doesn't tell."""
        return self._processes("nvmlDeviceGetGraphicsRunningProcesses", device)

    def utilization(self, device: Handle) -> float | None:
        """Share of the last moments in which it worked, 0..1; None when not known, as of every slice."""
        rates = self.maybe(lambda: self._call("nvmlDeviceGetUtilizationRates", device))
        return None if rates is None else int(rates.gpu) / 100

    def temperature(self, device: Handle) -> float | None:
        """Degrees Celsius; None when not known."""
        # The first call is to go away with CUDA 14, older drivers lack the second.
        old = self.maybe(lambda: float(self._call("nvmlDeviceGetTemperature", device, 0)))
        return old if old is not None else self.maybe(lambda: float(self._call("nvmlDeviceGetTemperatureV", device, 0)))

    def power_w(self, device: Handle) -> float | None:
        """Watts; None when not known."""
        return self.maybe(lambda: int(self._call("nvmlDeviceGetPowerUsage", device)) / 1000)

    @staticmethod
    def maybe(ask: Callable[[], T]) -> T | None:
        """A value that one can do without; None when the driver doesn't give it. That the card or the driver is gone is raised."""
        try:
            return ask()
        except NvmlError as error:
            if error.code in SESSION_LOST | CARD_LOST:
                raise
            return None

    def _processes(self, name: str, device: Handle) -> dict[int, int | None]:
        try:
            rows = self._call(name, device)
        except NvmlError as error:
            if error.code == INSUFFICIENT_SIZE:  # more than twice as many since it was asked for their number
                rows = self._call(name, device)
            elif error.code == FUNCTION_NOT_FOUND:  # a driver older than the third version of the call
                rows = self._call(f"{name}_v2", device)
            else:
                raise
        sizes: dict[int, int | None] = {}
        for row in rows:
            sizes[int(row.pid)] = larger(sizes.get(int(row.pid)), row.usedGpuMemory)
        return sizes

    def _load(self) -> ModuleType:
        if self._module is None:
            import pynvml  # here, so that a machine without NVIDIA's hardware doesn't pay for it at the start

            self._module = pynvml
        return self._module

    def _call(self, name: str, *args: object, **options: object) -> Any:
        """Call pynvml. Its errors can neither be hashed nor compared with None, so they don't get further than this."""
        module = self._load()
        try:
            return getattr(module, name)(*args, **options)
        except module.NVMLError as error:
            raise NvmlError(int(error.value), str(error)) from None
        except (module.NVMLLibraryMismatchError, AttributeError):
            raise NvmlError(FUNCTION_NOT_FOUND, f"the driver has no {name}") from None
        except UnicodeDecodeError:
            raise NvmlError(UNKNOWN, f"{name} gave text that is not UTF-8") from None


def larger(one: int | None, other: int | None) -> int | None:
    """The larger size; one that isn't known counts for nothing beside one that is."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
