"""Models that were found on disk, whether or not the config names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts


class Format(StrEnum):
    """How a model lies on disk, which decides which engines can load it."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One model on disk. `facts.problem` says why it cannot be used: still being written, truncated, unreadable, a part missing."""

    name: ModelName
    """Made from its file's name; stays the same as long as that does."""
    store: str
    """Whose folder it lies in: `models_path`, `huggingface`, `llama.cpp`, `ollama`, `lmstudio`."""
    format: Format
    facts: ModelFacts
    aliases: tuple[str, ...] = ()
    """What else people call it: `ORG/REPO:QUANT`, the file's own name."""
    projector: ModelFacts | None = None
    """The multimodal projector that belongs to it."""
    base: ModelFacts | None = None
    """Of an adapter: the model that it is applied to, as far as one was found. `facts` are then the adapter's own."""
    adapters: tuple[str, ...] = ()
    """Adapters that belong to it, by their paths."""
    is_adapter: bool = False

    @property
    def path(self) -> str:
        """Its file, its first shard or its folder."""
        return self.facts.path

    @property
    def loaded(self) -> ModelFacts:
        """What an engine would load first: an adapter's base, else itself."""
        return self.base if self.is_adapter and self.base else self.facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """What is remembered of a machine's disk from before the daemon's start."""

    present: Mapping[str, Found] = field(default_factory=dict)
    """By path, as last seen."""
    names: Mapping[str, ModelName] = field(default_factory=dict)
    """Of those that are gone too, so that one that comes back has its name again."""
