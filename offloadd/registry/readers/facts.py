"""Typed access to a header's metadata, for files that say anything at all."""

from __future__ import annotations

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.gguf import GgufHeader, Omitted

_MAX = 2**40
"""No count in a model's metadata comes near it."""


class Facts:
    """The keys of one header; short names are those of its architecture. Absent or of another type: the default."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.architecture = self.text("general.architecture")

    def refuse(self, name: str, problem: str) -> HeaderError:
        """The error to raise for the value of an architecture's key."""
        return self._header.refuse(f"{self.architecture}.{name}", problem)

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._header.metadata

    def text(self, key: str) -> str:
        """A string."""
        value = self._header.metadata.get(key)
        return value if isinstance(value, str) else ""

    def items(self, key: str) -> int:
        """How many items an array has."""
        value = self._header.metadata.get(key)
        if isinstance(value, Omitted):
            return value.count
        return len(value) if isinstance(value, tuple) else 0

    def whole(self, key: str, default: int = 0) -> int:
        """A whole number."""
        value = self._header.metadata.get(key)
        return value if isinstance(value, int) else default

    def flag(self, name: str, *, default: bool) -> bool:
        """A yes or no of the architecture."""
        value = self._header.metadata.get(f"{self.architecture}.{name}")
        return value if isinstance(value, bool) else default

    def number(self, name: str, default: int = 0) -> int:
        """A count of the architecture; of an array the first."""
        values = self._counts(name)
        return values[0] if values else default

    def listed(self, name: str) -> tuple[int, ...]:
        """An array of the architecture; empty when it is a single number or absent."""
        value = self._header.metadata.get(f"{self.architecture}.{name}")
        return self._counts(name) if isinstance(value, tuple) else ()

    def per_layer(self, name: str, layers: int, default: int) -> tuple[int, ...]:
        """A count for each block, given as an array or as one number for all."""
        values = self._counts(name) or (default,)
        if len(values) == 1:
            return values * layers
        return (values + (0,) * layers)[:layers]

    def _counts(self, name: str) -> tuple[int, ...]:
        value = self._header.metadata.get(f"{self.architecture}.{name}")
        values = value if isinstance(value, tuple) else (value,)
        counts = tuple(int(item) for item in values if isinstance(item, int))
        if any(not 0 <= count <= _MAX for count in counts):
            raise self.refuse(name, "is out of all proportion")
        return counts if len(counts) == len(values) else ()
