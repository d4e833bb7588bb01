"""The models of llama-swap's config: each a command, and what is to be done around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Protocol

from offloadd.config.nodes import Entry, Node
from offloadd.config.owned import owned_variable
from offloadd.config.source import Mark
from offloadd.migrate.command_line import Parsed
from offloadd.migrate.report import Migration
from offloadd.migrate.tree import entries, items, plain

NOT_NEEDED: Mapping[str, str] = {
    "name": "models have one name; /models shows what the file says of itself",
    "description": "models have no description",
    "metadata": "/models shows what the file says of itself",
    "unlisted": "every model is listed; keys with models: […] see only theirs",
    "sendLoadingState": "answers hold nothing that the model did not say; offloadctl explain tells what it waits for",
    "compat": "WebSockets count like requests",
    "capabilities": "/models shows what the file says of itself",
    "timeouts": "servers run on this machine; start_timeout, drain_timeout and queue.max_wait are the bounds",
}
_CARRIED = frozenset(
    (
        *("cmd", "macros", "ttl", "unloadTimeout", "aliases", "filters", "concurrencyLimit", "env"),
        *("proxy", "checkEndpoint", "cmdStop", "useModelName"),
    )
)
"""Keys of a model that are looked at."""


class Whole(Protocol):
    """The file around a model: what holds for all of them."""

    @property
    def made(self) -> Migration:
        """What it becomes."""
        ...

    @property
    def llama(self) -> str:
        """The llama-server of `backends.llamacpp`."""
        ...

    @property
    def start_timeout(self) -> str:
        """How long a start may take."""
        ...

    @property
    def stop_s(self) -> int | None:
        """How long a server has to end, in seconds; None for the usual time."""
        ...

    @property
    def ttl(self) -> int:
        """Seconds without a request until a model is unloaded; 0 for never."""
        ...

    def command(self, name: str, model: Node) -> Parsed | None:
        """The model's command taken apart; None when it has none that can be read."""
        ...

    def macros(self, name: str, fields: Mapping[str, Entry]) -> dict[str, str]:
        """Those of all, overridden by the model's own."""
        ...

    def fill(self, name: str, text: str, macros: Mapping[str, str]) -> str:
        """A text of this model with its macros filled in."""
        ...

    def rules(self, where: str, filters: Node, own: str = "", aliases: list[str] | None = None) -> dict[str, Any]:
        """`filters` as a model's `request`."""
        ...

    def took(self, name: str, key: str, settings: dict[str, Any], mark: Mark) -> None:
        """Add what all models share once the model is known."""
        ...


class Model:
    """One entry of `models`."""

    def __init__(self, whole: Whole, name: str, node: Node) -> None:
        self._whole, self._made, self._name, self._node = whole, whole.made, name, node
        self._fields = dict(entries(node))
        self._macros = whole.macros(name, self._fields)
        self._aliases: list[str] = []

    def add(self) -> None:
        """Add it to what is made."""
        parsed = self._whole.command(self._name, self._node)
        if parsed is None or not parsed.words:
            self._leave("cmd", "it has no command that can be read, so the model is not carried over")
            return
        for flag, why in parsed.left:
            self._leave("cmd", f"{flag}: {why}")
        settings = {**parsed.settings, "env": dict(parsed.env)}
        self._simple(settings)
        if parsed.engine == "" or (parsed.engine == "llamacpp" and parsed.program != self._whole.llama):
            self._custom(parsed, settings)
        else:
            self._builtin(parsed, settings)
        self._environment(settings)
        settings["aliases"] = [*settings.get("aliases", ()), *self._aliases]
        key = self._made.add_model(self._name, settings)
        self._whole.took(self._name, key, settings, self._node.mark)

    def _simple(self, settings: dict[str, Any]) -> None:
        settings["start_timeout"] = self._whole.start_timeout
        ttl = self._value("ttl", -1)
        seconds = self._whole.ttl if not isinstance(ttl, int) or ttl < 0 else ttl
        settings["idle_timeout"] = f"{seconds}s" if seconds else 0
        limit = self._value("unloadTimeout", 0) or self._whole.stop_s
        if isinstance(limit, int) and limit > 0:
            settings["stop_timeout"] = f"{limit}s"
        for item in items(self._fields["aliases"].node) if "aliases" in self._fields else ():
            value = plain(item)
            self._aliases.append(str(value["id"] if isinstance(value, dict) and "id" in value else value))
        if "filters" in self._fields:
            where = f"models.{self._name}.filters"
            settings["request"] = self._whole.rules(where, self._fields["filters"].node, self._name, self._aliases)
        limit = self._value("concurrencyLimit", 0)
        if isinstance(limit, int) and limit > 0:
            settings["queue"] = {"max_waiting": max(1, limit - settings.get("parallel", 1))}
        for key in self._fields:
            if key not in _CARRIED:
                self._leave(key, NOT_NEEDED.get(key, "not known"))

    def _builtin(self, parsed: Parsed, settings: dict[str, Any]) -> None:
        """llama-server, vLLM or TGI: offloadd knows how they are asked and stopped."""
        settings["backends"] = [parsed.engine]
        settings.setdefault("source", self._name)
        for key, why in (
            ("proxy", "the port is chosen for each launch"),
            ("checkEndpoint", "readiness is asked for in the engine's own way"),
            ("cmdStop", "it is stopped by signals, its whole process tree"),
            ("useModelName", "it is told the model's own name"),
        ):
            if key in self._fields:
                self._leave(key, why)

    def _custom(self, parsed: Parsed, settings: dict[str, Any]) -> None:
        """Any other program: an engine of its own, which is started by the whole command."""
        words, source = _take_source(parsed.words, self._name)
        if not any("${port}" in word for word in words):
            self._leave("cmd", "the port is chosen for each launch: put ${port} into the engine's command")
        engine: dict[str, Any] = {"kind": "custom", "command": words}
        check = self._value("checkEndpoint", "/health")
        if isinstance(check, str) and check.startswith("/"):
            engine["health"] = {"path": check}
        else:
            self._leave("checkEndpoint", "a server is ready when it answers: /health is asked")
        if "cmdStop" in self._fields:
            text = self._whole.fill(self._name, str(self._value("cmdStop", "")), self._macros)
            engine["stop_command"] = text.split()
        if "proxy" in self._fields and "${PORT}" not in str(self._value("proxy", "")):
            self._leave("proxy", "the port is chosen for each launch")
        name = self._made.add_engine(self._name, engine)
        settings |= {"source": source, "backends": [name], "args": [], "llamacpp": {}, "devices": None, "gpu_layers": None}
        if "useModelName" in self._fields:
            settings["sources"] = {name: str(self._value("useModelName", ""))}
        if PurePath(parsed.program).name in ("docker", "podman"):
            self._leave("cmd", "what runs in a container is not seen by the ledger: set vram to what it takes")
        elif parsed.engine == "llamacpp":
            self._leave("cmd", f"another llama-server than {self._whole.llama}: an engine of its own, without estimates of memory")
        else:
            self._leave("cmd", "no built-in engine: its memory is the size of its source with a margin, set vram to what it takes")

    def _environment(self, settings: dict[str, Any]) -> None:
        """`NAME=value` each. What chooses GPUs becomes `devices`: the ledger has to know."""
        for item in items(self._fields["env"].node) if "env" in self._fields else ():
            name, _, value = self._whole.fill(self._name, str(plain(item)), self._macros).partition("=")
            settings["env"][name] = value
        for name, value in list(settings["env"].items()):
            if name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
                del settings["env"][name]
                settings["devices"] = _devices(value)
            elif why := owned_variable(name):
                del settings["env"][name]
                self._leave("env", f"{name}: {why}")

    def _value(self, key: str, usual: Any) -> Any:
        return plain(self._fields[key].node) if key in self._fields else usual

    def _leave(self, key: str, why: str) -> None:
        mark = self._fields[key].key if key in self._fields else self._node.mark
        self._made.leave(mark, f"models.{self._name}.{key}", why)


def _devices(value: str) -> Any:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names or names == ["-1"]:
        return "cpu"
    return [int(name) if name.isdecimal() else name for name in names]


def _take_source(words: list[str], usual: str) -> tuple[list[str], str]:
    """The command with its model file as a word to be filled in, and that file. A path inside of a container is left alone."""
    if not {"docker", "podman"} & set(words):
        for index, word in enumerate(words[:-1]):
            if word in ("-m", "--model"):
                return [*words[: index + 1], "${source}", *words[index + 2 :]], words[index + 1]
    return list(words), usual
