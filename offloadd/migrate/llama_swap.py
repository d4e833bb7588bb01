"""llama-swap's config: macros, models, groups and matrix, hooks, peers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offloadd.config.nodes import Entry, Node
from offloadd.config.source import Mark
from offloadd.migrate.command_line import Parsed, parse
from offloadd.migrate.llama_swap_models import NOT_NEEDED, Model
from offloadd.migrate.report import Migration
from offloadd.migrate.tree import entries, items, plain, read_yaml

_MACRO = re.compile(r"(?<!\$)\$\{([A-Za-z0-9_.-]+)\}")
_LEAST_START_S, _USUAL_START_S = 15, 120
_NOT_NEEDED: Mapping[str, str] = {
    "logLevel": "the daemon's log has one line per event",
    "logTimeFormat": "the journal has its own times",
    "logToStdout": "servers' output is kept per instance: offloadctl logs",
    "metricsMaxInMemory": "metrics are for Prometheus: GET /metrics",
    "captureBuffer": "requests are not captured",
    "startPort": "free ports are chosen",
    "sendLoadingState": NOT_NEEDED["sendLoadingState"],
    "includeAliasesInList": "aliases are listed in GET /models only",
    "ui": "GET /ui shows what runs, not whose requests",
    "performance": "metrics are for Prometheus: GET /metrics",
    "upstream": "every request below /upstream may load its model",
    "profiles": "a name means one model; edit aliases and reload, which touches no model",
}
_KEPT = frozenset(("PORT", "PID", "MODEL_ID", "port", "model", "source"))
"""Filled in at each launch, there or here."""
Handler = Callable[[str, Entry], None]


def import_llama_swap(path: Path) -> Migration:
    """The config that does the same, and what it does not."""
    return _Import(read_yaml(path), path).run()


class _Import:
    """One file on its way."""

    def __init__(self, root: Node, path: Path) -> None:
        self._root = root
        self._made = Migration(f"llama-swap's {path.name}")
        self._macros: dict[str, str] = {}
        self._start_s = _USUAL_START_S
        self._ttl = 0
        self._stop_s: int | None = None
        self._names: dict[str, str] = {}
        self._pinned: set[str] = set()
        self._preloaded: set[str] = set()
        self._costs: dict[str, float] = {}
        self._llama = ""

    def run(self) -> Migration:
        """Settings that others depend on first, then the models, then the rest."""
        first: dict[str, Handler] = {
            "healthCheckTimeout": self._start_timeout,
            "globalTTL": self._global_ttl,
            "macros": self._read_macros,
            "unloadTimeout": self._stop_timeout,
            "groups": self._groups,
            "matrix": self._matrix,
            "routing": self._routing,
            "hooks": self._hooks,
        }
        then: dict[str, Handler] = {
            "models": self._models,
            "apiKeys": self._keys,
            "peers": self._peers,
            "selectors": self._selectors,
        }
        listed = dict(entries(self._root))
        for handlers in (first, then):
            for key, handler in handlers.items():
                if key in listed:
                    handler(key, listed[key])
        for key, entry in listed.items():
            if key not in first and key not in then:
                self._made.leave(entry.key, key, _NOT_NEEDED.get(key, "not known"))
        self._check_names()
        self._made.left.sort(key=lambda left: left.mark)
        return self._made

    # --- what applies to all ---

    def _start_timeout(self, _: str, entry: Entry) -> None:
        if isinstance(entry.node.value, int):
            self._start_s = max(_LEAST_START_S, entry.node.value)

    def _global_ttl(self, _: str, entry: Entry) -> None:
        if isinstance(entry.node.value, int):
            self._ttl = max(0, entry.node.value)

    def _stop_timeout(self, _: str, entry: Entry) -> None:
        if isinstance(entry.node.value, int) and entry.node.value > 0:
            self._stop_s = entry.node.value

    def _read_macros(self, _: str, entry: Entry) -> None:
        self._macros |= self._macros_of(entry.node, self._macros)

    def _macros_of(self, node: Node, outer: Mapping[str, str]) -> dict[str, str]:
        """Each may use those before it."""
        found: dict[str, str] = dict(outer)
        for name, entry in entries(node):
            found[name] = self._filled(str(plain(entry.node)), found, keep=True)
        return found

    def _filled(self, text: str, macros: Mapping[str, str], *, keep: bool = False) -> str:
        """The text with macros in it, and the environment's variables as a config names them."""

        def one(match: re.Match[str]) -> str:
            name = match[1]
            if name.startswith("env."):
                return f"${{env:{name[4:]}}}"
            return macros.get(name, match[0] if keep or name in _KEPT else f"$${{{name}}}")

        for _ in range(8):  # a macro may hold one that is set later, by a model
            filled = _MACRO.sub(one, text)
            if filled == text:
                break
            text = filled
        return text

    # --- models ---

    def _models(self, _: str, entry: Entry) -> None:
        self._llama = self._usual_server(entry.node)
        if self._llama not in ("", "llama-server"):
            self._made.backends["llamacpp"] = {"command": [self._llama]}
        for name, model in entries(entry.node):
            Model(self, name, model.node).add()

    def _usual_server(self, models: Node) -> str:
        """The llama-server that most models are started with: a config has one."""
        found: Counter[str] = Counter()
        for name, entry in entries(models):
            parsed = self.command(name, entry.node)
            if parsed is not None and parsed.engine == "llamacpp":
                found[parsed.program] += 1
        return found.most_common(1)[0][0] if found else ""

    def command(self, name: str, model: Node) -> Parsed | None:
        """The model's command taken apart; None when it has none that can be read."""
        fields = dict(entries(model))
        if "cmd" not in fields or not isinstance(fields["cmd"].node.value, str):
            return None
        try:
            lines = fields["cmd"].node.value.splitlines()
            text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
            return parse(self.fill(name, text, self.macros(name, fields)))
        except ValueError:
            return None

    def macros(self, name: str, fields: Mapping[str, Entry]) -> dict[str, str]:
        """Those of all, overridden by the model's own."""
        own = self._macros_of(fields["macros"].node, self._macros) if "macros" in fields else self._macros
        return {**own, "MODEL_ID": name, "PORT": "${port}"}

    def fill(self, name: str, text: str, macros: Mapping[str, str]) -> str:
        """A text of this model with its macros filled in."""
        del name
        return self._filled(text, macros)

    # --- what runs together ---

    def _groups(self, _: str, entry: Entry) -> None:
        for name, group in entries(entry.node):
            fields = dict(entries(group.node))
            members = [str(plain(item)) for item in items(fields["members"].node)] if "members" in fields else []
            persistent = "persistent" in fields and fields["persistent"].node.value is True
            if persistent:
                self._pinned.update(members)
            for key, usual in (("swap", True), ("exclusive", True)):
                value = plain(fields[key].node) if key in fields else usual
                if value and not persistent:
                    mark = fields[key].key if key in fields else group.key
                    why = f"memory decides what runs together; give one of {', '.join(members)} a lower priority, or run: never"
                    self._made.leave(mark, f"groups.{name}.{key}", why)

    def _matrix(self, _: str, entry: Entry) -> None:
        fields = dict(entries(entry.node))
        short = {key: str(plain(value.node)) for key, value in entries(fields["vars"].node)} if "vars" in fields else {}
        for key, cost in entries(fields["evict_costs"].node) if "evict_costs" in fields else ():
            if isinstance(cost.node.value, int | float):
                self._costs[short.get(key, key)] = float(cost.node.value)
                self._made.leave(
                    cost.key, f"matrix.evict_costs.{key}", "as a priority, which also lets it evict those of a lower one"
                )
        for name, written in entries(fields["sets"].node) if "sets" in fields else ():
            why = f"memory decides what runs together, within budget: {plain(written.node)}"
            self._made.leave(written.key, f"matrix.sets.{name}", why)
        for key, other in fields.items():
            if key not in ("vars", "evict_costs", "sets"):
                self._made.leave(other.key, f"matrix.{key}", "not known")

    def _routing(self, _: str, entry: Entry) -> None:
        """Where newer files have groups and matrix; only the one in use means anything."""
        fields = dict(entries(entry.node))
        router = dict(entries(fields.pop("router").node)) if "router" in fields else {}
        used = str(plain(router["use"].node)) if "use" in router else "group"
        for key, wanted in entries(router["settings"].node) if "settings" in router else ():
            if key == "groups" and used == "group":
                self._groups(key, wanted)
            elif key == "matrix" and used == "matrix":
                self._matrix(key, wanted)
            else:
                self._made.leave(wanted.key, f"routing.router.settings.{key}", f"not in use there: the router is {used}")
        for key, other in fields.items():
            self._made.leave(other.key, f"routing.{key}", "requests wait in turn, oldest first, by their models' priority")

    def _selectors(self, _: str, entry: Entry) -> None:
        """A name for one model is an alias; one that chooses is not there."""
        for name, selector in entries(entry.node):
            fields = dict(entries(selector.node))
            targets = [str(plain(item)) for item in items(fields["targets"].node)] if "targets" in fields else []
            strategy = str(plain(fields["strategy"].node)) if "strategy" in fields else ""
            model = self._made.models.get(self._names.get(targets[0], "")) if targets else None
            if strategy == "pin" and model is not None:
                model["aliases"] = [*model.get("aliases", ()), name]
            else:
                what = f"{strategy or 'a choice'} among {', '.join(targets)}"
                self._made.leave(
                    selector.key, f"selectors.{name}", f"{what}: a name means one model; give it replicas, or an alias"
                )

    def priority(self, name: str) -> int | None:
        """50 is what every model has; ten times the cost is 20 more."""
        cost = self._costs.get(name)
        return None if cost is None else max(1, min(99, 50 + round(20 * math.log10(max(cost, 0.01)))))

    def _hooks(self, _: str, entry: Entry) -> None:
        for key, hook in entries(entry.node):
            for action, wanted in entries(hook.node):
                if (key, action) == ("on_startup", "preload"):
                    self._preloaded.update(str(plain(item)) for item in items(wanted.node))
                else:
                    self._made.leave(wanted.key, f"hooks.{key}.{action}", "not known")

    def _check_names(self) -> None:
        """Names in groups, matrix and hooks that no model has."""
        listed = dict(entries(self._root))
        for key, names in (("groups", self._pinned), ("matrix", set(self._costs)), ("hooks", self._preloaded)):
            entry = listed.get(key) or listed.get("routing")
            if entry is not None:
                for name in sorted(names - self._names.keys()):
                    self._made.leave(entry.key, key, f'no model is called "{name}"')

    # --- who may call, and servers elsewhere ---

    def _keys(self, _: str, entry: Entry) -> None:
        keys = [self._filled(str(plain(item)), self._macros) for item in items(entry.node)]
        listed = [{"name": f"key-{number}", "key": key, "scopes": ["inference"]} for number, key in enumerate(keys, 1)]
        if listed:
            self._made.server["auth"] = {"keys": listed}
            self._made.leave(
                entry.key, "apiKeys", "carried over, for inference only: give one the scope admin to steer the daemon with"
            )

    def _peers(self, _: str, entry: Entry) -> None:
        for name, peer in entries(entry.node):
            fields = dict(entries(peer.node))
            url = self._filled(str(plain(fields["proxy"].node)), self._macros).rstrip("/") if "proxy" in fields else ""
            engine: dict[str, Any] = {"kind": "external", "url": url if url.endswith("/v1") else f"{url}/v1"}
            if "apiKey" in fields and plain(fields["apiKey"].node):
                engine["key"] = self._filled(str(plain(fields["apiKey"].node)), self._macros)
            key = self._made.add_engine(name, engine)
            rules = self.rules(f"peers.{name}", fields["filters"].node) if "filters" in fields else {}
            for item in items(fields["models"].node) if "models" in fields else ():
                self._made.add_model(str(plain(item)), {"source": str(plain(item)), "backends": [key], "request": rules})
            for other, value in fields.items():
                if other not in ("proxy", "apiKey", "models", "filters"):
                    self._made.leave(value.key, f"peers.{name}.{other}", NOT_NEEDED.get(other, "not known"))

    def rules(self, where: str, filters: Node, own: str = "", aliases: list[str] | None = None) -> dict[str, Any]:
        """`filters` as a model's `request`. Settings per alias cannot be carried; the aliases are."""
        found: dict[str, Any] = {}
        for key, entry in entries(filters):
            if key == "stripParams":
                found["remove"] = [name.strip() for name in str(plain(entry.node)).split(",") if name.strip()]
            elif key == "setParams":
                found["set"] = {**plain(entry.node), **found.get("set", {})}
            elif key == "setParamsByID" and aliases is not None:
                for written, values in entries(entry.node):
                    name = self._filled(written, {"MODEL_ID": own})
                    if name == own:
                        found["set"] = {**found.get("set", {}), **plain(values.node)}
                    else:
                        aliases.append(name)
                        self._made.leave(values.key, f"{where}.setParamsByID.{name}", "an alias sets no parameters of its own")
            else:
                self._made.leave(entry.key, f"{where}.{key}", "not known")
        # What is set wins in both programs, and removing it first would have no effect.
        found["remove"] = [name for name in found.get("remove", ()) if name not in found.get("set", {})]
        return {key: value for key, value in found.items() if value}

    # --- for one model ---

    @property
    def made(self) -> Migration:
        """What it becomes."""
        return self._made

    @property
    def llama(self) -> str:
        """The llama-server of `backends.llamacpp`."""
        return self._llama

    def took(self, name: str, key: str, settings: dict[str, Any], mark: Mark) -> None:
        """Add what all models share once the model is known."""
        self._names[name] = key
        model = self._made.models[key]
        if name in self._pinned:
            model["pinned"] = True
        if (priority := self.priority(name)) is not None:
            model["priority"] = priority
        if name in self._preloaded:
            if settings["idle_timeout"] == 0:
                model.pop("idle_timeout", None)
                model["run"] = "always"
            else:
                self._made.leave(mark, f"models.{name}", "preloaded at the start there, at its first request here: or run: always")

    @property
    def start_timeout(self) -> str:
        """How long a start may take."""
        return f"{self._start_s}s"

    @property
    def stop_s(self) -> int | None:
        """How long a server has to end, in seconds; None for the usual time."""
        return self._stop_s

    @property
    def ttl(self) -> int:
        """Seconds without a request until a model is unloaded; 0 for never."""
        return self._ttl
