"""What an import makes: a config, and what of the original it does not hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from offloadd.config.source import Mark

_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
_NOT_IN_ENGINES = re.compile(r"[^a-z0-9_-]+")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_ORDER = (
    *("source", "backends", "sources", "aliases", "run", "idle_timeout", "priority", "pinned", "context", "parallel"),
    *("gpu_layers", "devices", "vram", "queue", "start_timeout", "stop_timeout", "request", "args", "env", "llamacpp"),
)


@dataclass(frozen=True, slots=True)
class Left:
    """Something of the original that the config does not hold, or not in the same way."""

    mark: Mark
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.mark.file}:{self.mark.line}: {self.key}: {self.why}"


@dataclass(slots=True)
class Migration:
    """A config in the making, and what is left out of it."""

    title: str
    """What it was made from."""
    server: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def leave(self, mark: Mark, key: str, why: str) -> None:
        """Note what is not carried over."""
        self.left.append(Left(mark, key, why))

    def add_model(self, name: str, settings: dict[str, Any]) -> str:
        """Add a model under a name that a config may have; the original name stays as an alias where it differs."""
        key = free_name(_NOT_IN_NAMES.sub("-", name.lower()).strip("-._")[:60] or "model", self.models)
        if key != name:
            settings["aliases"] = [name, *settings.get("aliases", ())]
        aliases = [alias for alias in dict.fromkeys(settings.get("aliases", ())) if alias != key and self._is_free(alias)]
        settings["aliases"] = [alias for alias in aliases if _ALIAS.fullmatch(alias)]
        self.models[key] = {name: settings[name] for name in _ORDER if settings.get(name) not in (None, [], {})}
        return key

    def add_engine(self, name: str, settings: dict[str, Any]) -> str:
        """Add an engine under a name that a config may have."""
        key = _NOT_IN_ENGINES.sub("-", name.lower()).strip("-_")[:28]
        key = free_name(
            key if key[:1].isalpha() else f"engine-{key}", {*self.backends, "llamacpp", "vllm", "tgi", "custom", "external"}
        )
        self.backends[key] = settings
        return key

    def _is_free(self, alias: str) -> bool:
        return alias not in self.models and not any(alias in other.get("aliases", ()) for other in self.models.values())

    def text(self) -> str:
        """The config, with what was left out as comments at its head."""
        parts = {"server": self.server, "storage": self.storage, "backends": self.backends, "models": self.models}
        filled = {name: part for name, part in parts.items() if part} or {"models": {}}
        notes = [f"#   {left}" for left in self.left]
        head = [f"# From {self.title}, by offloadd import.", *(["# Not carried over, or not as it was:", *notes] if notes else [])]
        body = yaml.dump(filled, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        return "\n".join(_printable(line) for line in head) + "\n" + body


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name, with a number where it is taken."""
    known, number, found = set(taken), 2, name
    while found in known:
        found, number = f"{name}-{number}", number + 1
    return found


class _Dumper(yaml.SafeDumper):
    """Lists of words on one line, as people write them."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        """A list of words on one line."""
        del flow_style
        return super().represent_sequence(tag, sequence, flow_style=not any(isinstance(item, dict) for item in sequence))

    def ignore_aliases(self, data: Any) -> bool:
        """Everything is written out."""
        del data
        return True


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else " " for char in line)
