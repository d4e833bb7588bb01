"""What the small files of a folder in Hugging Face's layout say of a model, apart from its memory. Absent or odd: nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.shapes import knows_tools
from offloadd.registry.readers.source import open_source

_MAX = 2**20
_LICENSE = re.compile(r"^license:\s*[\"']?([A-Za-z0-9][A-Za-z0-9._-]{0,63})", re.MULTILINE)
_POOLINGS = (("pooling_mode_cls_token", "cls"), ("pooling_mode_lasttoken", "last"), ("pooling_mode_mean_tokens", "mean"))


def said_beside(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the model's shape."""
    template = _template(folder)
    return {
        "chat_template": bool(template),
        "tools": knows_tools(template),
        "pooling": _pooling(folder, config),
        "senses": tuple(sense for sense in ("vision", "audio") if isinstance(config.get(f"{sense}_config"), dict)),
        "license": license_of(folder),
    }


def _template(folder: Path) -> str:
    text = _text(folder / "chat_template.jinja")
    if text:
        return text
    written = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(written, list):
        parts = [entry.get("template") for entry in written if isinstance(entry, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return written if isinstance(written, str) else ""


def _pooling(folder: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names):
        return "rank"
    if not (folder / "modules.json").is_file():  # which those that are made to embed sentences have
        return ""
    modes = _json(folder / "1_Pooling" / "config.json")
    return next((name for key, name in _POOLINGS if modes.get(key) is True), "mean")


def license_of(folder: Path) -> str:
    """As the front of its README says it."""
    text = _text(folder / "README.md")
    begin, front, _ = text.partition("---")[2].partition("\n---") if text.startswith("---") else ("", "", "")
    found = _LICENSE.search(begin) if front else None
    return found[1] if found else ""


def _text(path: Path) -> str:
    try:
        with open_source(path, 2 * _MAX) as source:
            return source.take(min(source.size, _MAX)).decode("utf-8", "replace")
    except HeaderError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        return msgspec.json.decode(text, type=dict[str, Any]) if text else {}
    except (msgspec.DecodeError, RecursionError):
        return {}
