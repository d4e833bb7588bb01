"""Folders in which models lie: those of the config, and where other programs keep theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MODELS_PATH = "models_path"
HUB = "huggingface"
LLAMACPP = "llama.cpp"
OLLAMA = "ollama"
LMSTUDIO = "lmstudio"
FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Store:
    """One folder that is searched. `kind` says how it is laid out."""

    kind: str
    path: str


def stores_of(models_path: Sequence[str], others: Sequence[str] | Literal["auto"], environment: Mapping[str, str]) -> list[Store]:
    """What to search, in the order in which names are given: the config's own folders come first. Blocks."""
    found = [Store(MODELS_PATH, path) for path in models_path]
    found += well_known(environment) if others == "auto" else [Store(kind_of(Path(path)), path) for path in others]
    return list({store.path: store for store in reversed(found)}.values())[::-1]


def well_known(environment: Mapping[str, str]) -> list[Store]:
    """Where other programs keep models of this user, or of the machine."""
    return [Store(kind, str(path)) for kind, path in _well_known(environment) if path.is_absolute()]


def _well_known(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    home = Path(environment.get("HOME") or "/nonexistent")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    yield HUB, Path(hub) if hub else Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    yield LLAMACPP, Path(environment.get("LLAMA_CACHE") or cache / "llama.cpp")
    if "OLLAMA_MODELS" in environment:
        yield OLLAMA, Path(environment["OLLAMA_MODELS"])
    yield OLLAMA, home / ".ollama/models"
    yield OLLAMA, Path("/usr/share/ollama/.ollama/models")
    yield OLLAMA, Path("/var/lib/ollama/models")
    yield LMSTUDIO, home / ".lmstudio/models"
    yield LMSTUDIO, cache / "lm-studio/models"


def kind_of(path: Path) -> str:
    """How a folder that the config names is laid out, by what is in it."""
    try:
        if (path / "manifests").is_dir() and (path / "blobs").is_dir():
            return OLLAMA
        if any(entry.name.startswith("models--") for entry in path.iterdir()):
            return HUB
    except OSError:
        pass
    return FOLDER
