"""llama-server's own list of models for its router: an INI file, one section a model, keys as its flags without dashes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offloadd.config.source import Mark
from offloadd.errors import PermanentError
from offloadd.migrate.command_line import Parsed, read_llama_flags
from offloadd.migrate.report import Migration
from offloadd.migrate.tree import read_text

_SECTION = re.compile(r"\[(?P<name>[^\]]+)\]")
_KEY = re.compile(r"(?P<key>[A-Za-z0-9_.-]+)\s*=\s*(?P<value>.*)")
_FOR_ALL = "*"
_VARIABLE = "LLAMA_ARG_"
_ON = frozenset(("true", "on", "yes", "enabled"))
_OFF = frozenset(("false", "off", "no", "disabled"))
_VALUED = frozenset(("--flash-attn", "-fa"))
"""Flags for which `on` and `off` are values."""


@dataclass(slots=True)
class _Section:
    """Keys of one section, each with its value and line."""

    mark: Mark
    keys: dict[str, tuple[str, Mark]] = field(default_factory=dict)


def import_presets(path: Path) -> Migration:
    """The config that does the same, and what it does not."""
    made = Migration(f"llama-server's {path.name}")
    sections = _read(path, made)
    common = sections.pop(_FOR_ALL, None)
    for name, section in sections.items():
        keys = {**(common.keys if common else {}), **section.keys}
        _add(made, name, section.mark, keys)
    return made


def _read(path: Path, made: Migration) -> dict[str, _Section]:
    sections: dict[str, _Section] = {}
    present: _Section | None = None
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text, mark = line.strip(), Mark(str(path), number, 1)
        if not text or text[0] in "#;":
            continue
        if head := _SECTION.fullmatch(text):
            present = sections.setdefault(head["name"].strip(), _Section(mark))
        elif pair := _KEY.fullmatch(text):
            if present is not None:
                present.keys[pair["key"]] = (pair["value"].strip(), mark)
            elif pair["key"] != "version":
                made.leave(mark, pair["key"], "stands in no section")
        else:
            raise PermanentError(f"{mark}: neither a [section] nor key = value")
    return sections


def _add(made: Migration, name: str, mark: Mark, keys: dict[str, tuple[str, Mark]]) -> None:
    parsed, more = Parsed(), dict[str, Any]()
    words: list[str] = []
    places: dict[str, Mark] = {}
    for key, (value, place) in keys.items():
        if key == "load-on-startup":
            more |= {"run": "always"} if value in _ON else {}
        elif key == "stop-timeout":
            more |= {"stop_timeout": f"{value}s"} if value.isdecimal() and value != "0" else {}
        else:
            flag = _flag(key)
            places[flag] = place
            words += _words(flag, value)
    read_llama_flags(parsed, words)
    for flag, why in parsed.left:
        made.leave(places.get(flag, mark), f"{name}.{flag.lstrip('-')}", why)
    settings = {"backends": ["llamacpp"], "source": name, **parsed.settings, **more}
    made.add_model(name, settings)


def _flag(key: str) -> str:
    """`ctx-size`, `c` and `LLAMA_ARG_CTX_SIZE` are one."""
    name = key.removeprefix(_VARIABLE).lower().replace("_", "-") if key.startswith(_VARIABLE) else key
    return f"--{name}" if len(name) > 3 or "-" in name else f"-{name}"


def _words(flag: str, value: str) -> list[str]:
    if value.lower() in _ON and flag not in _VALUED:
        return [flag]
    if value.lower() in _OFF and flag not in _VALUED:
        return [f"--no-{flag.lstrip('-')}"]
    return [flag, value]
