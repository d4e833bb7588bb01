"""Ollama's store and its Modelfiles. The files stay where they are: a model's source is the blob that Ollama keeps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offloadd.config.source import Mark
from offloadd.errors import PermanentError
from offloadd.migrate.report import Migration
from offloadd.migrate.tree import read_text

_USUAL_STORES = ("~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")
_HOME, _LIBRARY = "registry.ollama.ai", "library"
_DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
_LAYER = "application/vnd.ollama.image."
_MAX_JSON = 2**20
_MAX_MODELS = 2000
_DEFAULTS = {"context": 4096, "parallel": 1, "idle_timeout": "5m"}
"""What Ollama does where nothing else is said."""
_SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repeat_penalty", "repeat_last_n", "stop")},
    **{name: name for name in ("presence_penalty", "frequency_penalty", "typical_p", "mirostat", "mirostat_tau", "mirostat_eta")},
    "num_predict": "max_tokens",
}
"""Parameters that become defaults of requests, by their names in a request."""
_COMMAND = re.compile(r"(?P<word>[A-Za-z]+)\s+(?P<rest>.*)", re.DOTALL)
_TEMPLATE = "the chat template of the model's file is used"
_SYSTEM = "requests bring their own system message; a client or its prompt has to say it"


@dataclass(slots=True)
class _Found:
    """One model, from the store or a Modelfile."""

    name: str
    mark: Mark
    source: str = ""
    lora: list[str] = field(default_factory=list)
    mmproj: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[Mark, str, str]] = field(default_factory=list)


def import_ollama(path: Path | None) -> Migration:
    """A store (the usual one when none is given), or one Modelfile."""
    place = path or _usual_store()
    made = Migration(f"Ollama's {place}")
    if place.is_file():
        _add(made, _read_modelfile(place))
        return made
    if not (place / "manifests").is_dir():
        raise PermanentError(f"{place} is no store of Ollama", hint="it has the folders manifests and blobs; or give a Modelfile")
    for manifest in _manifests(place):
        _add(made, _read_manifest(place, manifest))
    made.storage["models_path"] = [str(place.resolve() / "blobs")]
    return made


def _usual_store() -> Path:
    named = os.environ.get("OLLAMA_MODELS")
    places = [Path(name).expanduser() for name in ((named,) if named else _USUAL_STORES)]
    found = next((place for place in places if (place / "manifests").is_dir()), None)
    if found is None:
        looked = ", ".join(map(str, places))
        raise PermanentError(f"there is no store of Ollama in {looked}", hint="name its folder, or a Modelfile")
    return found


def _manifests(store: Path) -> Iterator[Path]:
    """One file a model: HOST/NAMESPACE/MODEL/TAG below `manifests`."""
    found = sorted(path for path in (store / "manifests").glob("*/*/*/*") if path.is_file())
    if len(found) > _MAX_MODELS:
        raise PermanentError(f"{store} has more than {_MAX_MODELS} models")
    yield from found


def _read_manifest(store: Path, path: Path) -> _Found:
    host, namespace, model, tag = path.relative_to(store / "manifests").parts
    parts = [part for part, usual in ((host, _HOME), (namespace, _LIBRARY)) if part != usual]
    name = "/".join((*parts, model)) + ("" if tag == "latest" else f":{tag}")
    found = _Found(name, Mark(str(path), 1, 1))
    layers = _json(path).get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if not isinstance(layer, dict):
            continue
        kind, digest = str(layer.get("mediaType", "")), str(layer.get("digest", ""))
        if kind.startswith(_LAYER) and _DIGEST.fullmatch(digest):
            blob = store.resolve() / "blobs" / digest.replace(":", "-")
            _take_layer(found, kind.removeprefix(_LAYER), blob)
    return found


def _take_layer(found: _Found, kind: str, blob: Path) -> None:
    if kind == "model":
        found.source = str(blob)
    elif kind == "adapter":
        found.lora.append(str(blob))
    elif kind == "projector":
        found.mmproj = str(blob)
    elif kind == "params":
        found.parameters = _json(blob)
    elif kind in ("template", "system", "messages"):
        found.left.append((Mark(str(blob), 1, 1), kind, {"template": _TEMPLATE}.get(kind, _SYSTEM)))


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise PermanentError(f"cannot read {path}: {error}") from None
    return value if isinstance(value, dict) else {}


def _file(folder: Path, name: str) -> Path | None:
    """The file of this name; None when there is none, also for a name that no file can have."""
    try:
        file = (folder / name).resolve()
        return file if file.is_file() else None
    except (OSError, ValueError):
        return None


def _read_modelfile(path: Path) -> _Found:
    found = _Found(path.resolve().parent.name, Mark(str(path), 1, 1))
    for mark, word, rest in _commands(path):
        if word == "FROM":
            file = _file(path.parent, rest)
            found.source = rest if file is None else str(file)
            if file is None:
                found.left.append((mark, "FROM", f"{rest} is no file here: set source to its GGUF file, or import the store"))
        elif word == "ADAPTER":
            found.lora.append(str(_file(path.parent, rest) or rest))
        elif word == "PARAMETER":
            name, _, value = rest.partition(" ")
            _parameter(found.parameters, name.lower(), value.strip())
        elif word in ("TEMPLATE", "SYSTEM", "MESSAGE"):
            found.left.append((mark, word, _TEMPLATE if word == "TEMPLATE" else _SYSTEM))
        elif word not in ("LICENSE", "REQUIRES"):
            found.left.append((mark, word, "not known"))
    if not found.source:
        raise PermanentError(f"{path} has no FROM, so it is no Modelfile")
    return found


def _commands(path: Path) -> Iterator[tuple[Mark, str, str]]:
    """Each command with its place; a text in three quotes may go over several lines."""
    lines = read_text(path).splitlines()
    at = 0
    while at < len(lines):
        text, mark = lines[at].strip(), Mark(str(path), at + 1, 1)
        at += 1
        while text.count('"""') == 1 and at < len(lines):
            text += "\n" + lines[at]
            at += 1
        if not text or text.startswith("#"):
            continue
        match = _COMMAND.fullmatch(text)
        if match is None:
            raise PermanentError(f"{mark}: no command of a Modelfile")
        yield mark, match["word"].upper(), match["rest"].strip().strip('"').strip()


def _parameter(parameters: dict[str, Any], name: str, value: str) -> None:
    if name == "stop":
        parameters.setdefault("stop", []).append(value.strip('"'))
        return
    try:
        parameters[name] = json.loads(value)
    except ValueError:
        parameters[name] = value


def _add(made: Migration, found: _Found) -> None:
    for mark, key, why in found.left:
        made.leave(mark, f"{found.name}: {key}", why)
    if not found.source:
        made.leave(found.mark, found.name, "it has no model file of its own, as models in the cloud do: not carried over")
        return
    options: dict[str, Any] = {"lora": found.lora, "mmproj": found.mmproj}
    settings: dict[str, Any] = {"source": found.source, "backends": ["llamacpp"], **_DEFAULTS}
    defaults: dict[str, Any] = {}
    for name, value in found.parameters.items():
        _carry(made, found, settings, options, defaults, name, value)
    if defaults:
        settings["request"] = {"default": defaults}
    settings["llamacpp"] = {key: value for key, value in options.items() if value}
    base, _, tag = found.name.rpartition("/")[2].partition(":")
    settings["aliases"] = [found.name, *([f"{found.name}:latest"] if not tag else [])]
    made.add_model(f"{base}-{tag}" if tag else base, settings)


def _carry(
    made: Migration,
    found: _Found,
    settings: dict[str, Any],
    options: dict[str, Any],
    defaults: dict[str, Any],
    name: str,
    value: Any,
) -> None:
    """One parameter to where it belongs."""
    if name == "num_ctx" and _is_count(value):
        settings["context"] = value
    elif name == "num_gpu" and isinstance(value, int):
        settings |= {"devices": "cpu"} if value == 0 else {"gpu_layers": value if 0 < value < 99 else "all"}
    elif name in ("num_thread", "num_batch") and _is_count(value):
        options["threads" if name == "num_thread" else "batch"] = value
    elif name in _SAMPLING:
        if not (name == "num_predict" and isinstance(value, int) and value < 0):
            defaults[_SAMPLING[name]] = value
    else:
        made.leave(found.mark, f"{found.name}: {name}", "not known")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0
