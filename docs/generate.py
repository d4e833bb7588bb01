"""Writes docs/config.md, commands.md and api.md from what they describe: `make docs`. A test checks that they are current."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

import offloadd.ctl  # noqa: F401  (adds the commands to their app)
from offloadd import cli
from offloadd.api.operations import OPERATIONS
from offloadd.backends import discover
from offloadd.config import json_schema
from offloadd.ctl.app import app as ctl_app

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by `make docs`: edit the doc strings that it comes from. -->\n"
Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """Each generated page's text."""
    written = {"config.md": _Config(json_schema(discover())).page(), "commands.md": _commands(), "api.md": _api()}
    return {name: GENERATED + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n" for name, lines in written.items()}


# --- the config ---


class _Config:
    """The schema as tables, one a mapping."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._parts: list[str] = []
        self._seen: dict[str, str] = {}

    def page(self) -> list[str]:
        self._parts += [
            "# Config reference",
            "",
            "One file, YAML or JSON, or a directory of them which are laid over one another. `offloadd check PATH` says all",
            "that is wrong with one, with file, line and column; `offloadd schema` prints the JSON Schema for editors. Sizes and",
            "times carry their unit: `6GiB`, `512MiB`, `90s`, `10m`. `${env:NAME}` and `${file:/path}` work in any text.",
        ]
        self._mapping("", self._schema)
        return self._parts

    def _mapping(self, path: str, schema: Schema) -> None:
        self._parts += ["", f"## {path}" if path else "## The file", "", schema.get("description", ""), ""]
        self._parts += ["| key | what it takes | default | meaning |", "| --- | --- | --- | --- |"]
        below: list[tuple[str, Schema]] = []
        needed = schema.get("required", ())
        for key, value in schema["properties"].items():
            inner, name = self._inner(path, key, value)
            if inner is not None:
                below.append((name, inner))
            default = "needed" if key in needed else "" if inner is not None else _default(value)
            self._parts.append(f"| `{key}` | {self._type(path, key, value)} | {default} | {_cell(self._meaning(value))} |")
        for name, inner in below:
            if inner["title"] not in self._seen:
                self._seen[inner["title"]] = name
                self._mapping(name, inner)

    def _inner(self, path: str, key: str, value: Schema) -> tuple[Schema | None, str]:
        """The mapping below a key, if it has known keys of its own, and where it is."""
        name = f"{path}.{key}" if path else key
        for choice in value.get("anyOf", (value,)):
            if "$ref" in choice:
                found = self._resolved(choice)
                return (self._same(found), name) if "properties" in found else (None, name)
            if "patternProperties" in choice:
                (member,) = choice["patternProperties"].values()
                found = self._resolved(member)
                return (found, f"{name}.NAME") if "properties" in found else (None, name)
            if choice.get("type") == "array" and "$ref" in choice.get("items", {}):
                return self._resolved(choice["items"]), f"{name}[]"
        return None, name

    def _same(self, found: Schema) -> Schema:
        """A mapping whose keys are all those of another one, which is described already."""
        for title in self._seen:
            known = self._schema["$defs"].get(title)
            if known and found["title"] != title and found["properties"].items() <= known["properties"].items():
                return known
        return found

    def _type(self, path: str, key: str, value: Schema) -> str:
        inner, where = self._inner(path, key, value)
        if inner is not None:
            target = self._seen.get(inner["title"], where)
            what = "list of" if where.endswith("[]") else "mapping by name:" if where.endswith(".NAME") else ""
            words = [f"`{choice['const']}` or" for choice in value.get("anyOf", ()) if "const" in choice]
            return " ".join([*words, *filter(None, [what]), f"[{target}](#{_anchor(target)})"])
        return _cell(_words(self._resolved(value)))

    def _meaning(self, value: Schema) -> str:
        return str(value.get("description") or self._resolved(value).get("description", ""))

    def _resolved(self, value: Schema) -> Schema:
        return self._schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def _words(schema: Schema) -> str:
    """A type as people say it."""
    if "anyOf" in schema:
        choices = [_words(choice) for choice in schema["anyOf"] if choice != {"const": 0} and choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(choices))
    if "enum" in schema:
        return ", ".join(f"`{_written(value)}`" for value in schema["enum"])
    if "examples" in schema:
        return ", ".join(f"`{value}`" for value in schema["examples"])
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_words(schema.get('items', {}))}"
    if kind in ("integer", "number"):
        low, high = schema.get("minimum"), schema.get("maximum")
        number = "whole number" if kind == "integer" else "number"
        return f"{number}, {low} to {high}" if low is not None and high is not None else number
    return {"string": "text", "boolean": "`true`, `false`", "object": "mapping"}.get(str(kind), str(kind))


def _default(value: Schema) -> str:
    default = value.get("default")
    return "" if default is None or default in ([], {}, "") else f"`{_cell(_written(default))}`"


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- the commands ---


def _commands() -> Iterator[str]:
    yield "# Commands"
    yield ""
    yield "Exit codes: 0 fine, 1 a failure that was foreseen (a bad config, a refusal, no daemon), 2 wrong usage, 3 a bug."
    yield "`--install-completion` has the shell complete commands, options and models' names."
    for name, app in (("offloadd", cli.app), ("offloadctl", ctl_app)):
        group: Any = typer.main.get_command(app)
        yield from ("", f"## {name}", "", (group.help or "").strip(), "")
        yield from _options(group)
        yield from _of_group(name, group)


def _of_group(path: str, group: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        yield from ("", f"### {path} {name}", "", (command.help or "").strip())
        if hasattr(command, "commands"):
            yield from _of_group(f"{path} {name}", command)
            continue
        words = [_metavar(param) for param in command.params if param.param_type_name == "argument"]
        yield from ("", "```text", " ".join([path, name, *words]), "```", "")
        yield from _options(command)


def _options(command: Any) -> Iterator[str]:
    hidden = ("help", "install_completion", "show_completion")
    listed = [param for param in command.params if not getattr(param, "hidden", False) and param.name not in hidden]
    if listed:
        yield from ("| option | meaning |", "| --- | --- |")
    for param in listed:
        is_argument = param.param_type_name == "argument"
        names = [_metavar(param)] if is_argument else [*param.opts, *param.secondary_opts]
        notes = [str(param.help or "")]
        if not is_argument and param.default not in (None, "", False, ()) and not callable(param.default):
            notes.append(f"Default: `{param.default}`.")
        if param.envvar:
            notes.append(f"Variable: `{param.envvar}`.")
        yield f"| {', '.join(f'`{name}`' for name in names)} | {_cell(' '.join(notes))} |"


def _metavar(param: Any) -> str:
    name = param.metavar or param.name.upper()
    return name if param.required or name.startswith("[") else f"[{name}]"


# --- the API ---


def _api() -> Iterator[str]:
    yield "# HTTP API"
    yield ""
    yield "`GET /openapi.json` describes it for programs. Without `server.auth.keys` whoever reaches the address may do"
    yield "everything; with them, each operation needs a key with its scope."
    for tag in dict.fromkeys(operation.tag for operation in OPERATIONS.values()):
        yield from ("", f"## {tag}", "", "| operation | scope | what it does | query |", "| --- | --- | --- | --- |")
        for operation in OPERATIONS.values():
            if operation.tag == tag:
                query = ", ".join(f"`{name}`" for name in operation.query or ())
                yield f"| `{operation.method} {operation.path}` | {operation.scope} | {_cell(operation.says)} | {query} |"


def main() -> None:
    """Write them."""
    for name, text in pages().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
