"""Headers of the models found, each read once for as long as its files stay what they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offloadd import lasting
from offloadd.errors import PermanentError
from offloadd.registry.content import content_of
from offloadd.registry.discovery.tree import Mark
from offloadd.registry.readers import HeaderError
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import LayerShape, ModelShape
from offloadd.units import Bytes

SETTLE_S = 0.5
"""A file that was written to within so long is not finished, whatever its header says."""
GROWING_S = 60.0
"""One that is too short and was written to within so long is on its way; after that it is truncated."""
_GROWING = "is still being written"


@dataclass(frozen=True, slots=True)
class _Reading:
    identity: str
    facts: ModelFacts
    is_short: bool
    read_at: float


class Headers:
    """A cache by the model's path. Everything blocks."""

    def __init__(self, read_shape: Callable[[Path], ModelShape], wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._read_shape = read_shape
        self._wall_ns = wall_ns
        self._known: dict[str, _Reading] = {}
        self._layers: dict[LayerShape, LayerShape] = {}
        self.due: list[float] = []
        """In how many seconds something should be looked at again."""
        self.read = 0
        """How many were read."""

    def remember(self, facts: ModelFacts) -> None:
        """What an earlier daemon read of files that may be the same still."""
        if facts.path and facts.identity and not facts.problem:
            self._known[facts.path] = _Reading(facts.identity, self._shared(facts), False, 0.0)

    def facts(self, path: str, parts: Sequence[str], marks: Sequence[Mark]) -> ModelFacts:
        """What the model at `path` is, whose files are `parts`."""
        identity = "|".join(f"{device:x}:{inode:x}:{size:x}:{changed:x}" for changed, size, inode, device in marks)
        known = self._known.get(path)
        age_s = min((abs(self._wall_ns() - mark[0]) for mark in marks), default=0) / 1e9
        if known is None or known.identity != identity:
            if known is not None and known.is_short and time.monotonic() - known.read_at < SETTLE_S:
                self.due.append(SETTLE_S)  # it grows by the moment: reading it each time would bring nothing
                return replace(known.facts, problem=_growing(marks))
            known = self._known[path] = self._read(path, parts, marks, identity)
        if known.is_short:
            return self._short(known.facts, marks, age_s)
        if age_s < SETTLE_S and not known.facts.problem:
            self.due.append(SETTLE_S - age_s)
            return replace(known.facts, problem=_growing(marks))
        return known.facts

    def forget(self, present: Mapping[str, object]) -> None:
        """Drop all but these paths."""
        self._known = {path: reading for path, reading in self._known.items() if path in present}

    def _short(self, facts: ModelFacts, marks: Sequence[Mark], age_s: float) -> ModelFacts:
        if age_s < GROWING_S:
            self.due.append(GROWING_S - age_s)
            return replace(facts, problem=_growing(marks))
        return facts

    def _read(self, path: str, parts: Sequence[str], marks: Sequence[Mark], identity: str) -> _Reading:
        self.read += 1
        lasting.made()
        size = Bytes(sum(mark[1] for mark in marks))
        facts = ModelFacts(path=path, size=size, identity=identity)
        is_short = not size
        problem = hint = ""
        try:
            shape = self._read_shape(Path(path))
            facts = replace(facts, shape=shape, content=content_of([Path(part) for part in parts]))
        except HeaderError as error:
            is_short, problem, hint = is_short or error.is_short, error.message, error.hint
        except PermanentError as error:
            problem, hint = error.message, error.hint
        except OSError as error:
            problem, hint = f"cannot be read: {error.strerror}", "make it readable for the daemon's user"
        if is_short:
            problem = "is empty" if not size else f"is truncated: {problem}"
            hint = "copy or download the file again, and compare its size with the original"
        return _Reading(identity, self._shared(replace(facts, problem=problem, hint=hint)), is_short, time.monotonic())

    def _shared(self, facts: ModelFacts) -> ModelFacts:
        """With layers that are equal held once: most of a model's are, and there may be very many models."""
        if facts.shape is None:
            return facts
        if len(self._layers) > 100_000:
            self._layers.clear()
        layers = tuple(self._layers.setdefault(layer, layer) for layer in facts.shape.layers)
        return replace(facts, shape=replace(facts.shape, layers=layers))


def _growing(marks: Sequence[Mark]) -> str:
    return f"{_GROWING} ({sum(mark[1] for mark in marks):,} bytes so far)"
