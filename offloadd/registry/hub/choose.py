"""Which files of a repository a pull takes. Pure: the list of files is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from offloadd.errors import PermanentError
from offloadd.registry.content import SHARD
from offloadd.units import format_bytes

_SOURCE = re.compile(
    r"(?:hf\.co/|huggingface\.co/)?(?P<organisation>[A-Za-z0-9][A-Za-z0-9._-]{0,95})/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?::(?P<quantization>[A-Za-z0-9][A-Za-z0-9._-]{0,63}))?"
)
_PREFERRED = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_0", "Q8_0", "MXFP4", "F16", "BF16")
_PROJECTORS = ("f16", "bf16", "q8_0", "f32")
_FOLDER_FILES = re.compile(
    r"[^/]+\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|adapter_config\.json|tokenizer[^/]*"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|[^/]*\.model|chat_template\.(?:jinja|json)"
    r"|preprocessor_config\.json|processor_config\.json|modules\.json|1_Pooling/config\.json|README\.md|LICENSE[^/]*"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """`ORG/NAME[:QUANT]`."""

    repository: str
    quantization: str = ""

    def __str__(self) -> str:
        return f"{self.repository}:{self.quantization}" if self.quantization else self.repository


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository; `sha256` is empty for small ones, which have git's own `blob` mark."""

    path: str
    size: int
    sha256: str = ""
    blob: str = ""


def parse_wanted(text: str) -> Wanted:
    """Read `ORG/NAME[:QUANT]`; PermanentError says what was expected."""
    found = _SOURCE.fullmatch(text.strip())
    if found is None or ".." in text:
        raise PermanentError(f'"{text[:100]}" names no repository', hint="write ORG/NAME, or ORG/NAME:Q4_K_M for one quantization")
    return Wanted(f"{found['organisation']}/{found['name']}", found["quantization"] or "")


def choose(wanted: Wanted, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files to take, the model's first one last: once that is there, all is. PermanentError when there are none that fit."""
    sound = [file for file in files if _is_safe(file.path)]
    models = [file for file in sound if file.path.lower().endswith(".gguf")]
    if models:
        return _gguf(wanted, models)
    if wanted.quantization:
        raise PermanentError(f"{wanted.repository} has no GGUF files, so no quantization to choose", hint="leave it out")
    chosen = [file for file in sound if _FOLDER_FILES.fullmatch(file.path)]
    if not any(file.path.endswith(".safetensors") for file in chosen):
        raise PermanentError(f"{wanted.repository} has neither GGUF nor safetensors files", hint="name a repository that has")
    return tuple(sorted(chosen, key=lambda file: (file.path == "config.json", file.path)))


def _is_safe(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and path.isprintable() and "\\" not in path


def _gguf(wanted: Wanted, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    projectors = [file for file in files if _name(file).lower().startswith("mmproj")]
    groups: dict[str, list[RemoteFile]] = {}
    for file in files:
        if file not in projectors:
            groups.setdefault(_stem(file), []).append(file)
    stem = _chosen(wanted, groups)
    projector = min(projectors, key=_projector_rank, default=None)
    first_last = sorted(groups[stem], key=lambda file: file.path, reverse=True)
    return ((projector,) if projector else ()) + tuple(first_last)


def _chosen(wanted: Wanted, groups: dict[str, list[RemoteFile]]) -> str:
    for quantization in [wanted.quantization] if wanted.quantization else _PREFERRED:
        fitting = sorted((stem for stem in groups if _has(stem, quantization)), key=lambda stem: (len(stem), stem))
        if fitting:
            return fitting[0]
    if len(groups) == 1 and not wanted.quantization:
        return next(iter(groups))
    known = ", ".join(f"{stem} ({format_bytes(_size(group))})" for stem, group in sorted(groups.items())[:30])
    what = f"nothing of {wanted.repository} is called {wanted.quantization}" if wanted.quantization else "there are several"
    raise PermanentError(f"{what}; it has {known or 'no model'}", hint="choose one: ORG/NAME:QUANT")


def _has(stem: str, quantization: str) -> bool:
    """Whether the name says so, as a word: Q4_K is not in Q4_K_M."""
    return re.search(rf"(?:^|[-._/]){re.escape(quantization)}$", stem, re.IGNORECASE) is not None


def _stem(file: RemoteFile) -> str:
    shard = SHARD.fullmatch(_name(file))
    return shard["stem"] if shard else _name(file)[:-5]


def _name(file: RemoteFile) -> str:
    return PurePosixPath(file.path).name


def _projector_rank(file: RemoteFile) -> tuple[int, str]:
    name = _name(file).lower()
    found = (index for index, kind in enumerate(_PROJECTORS) if re.search(rf"[-._]{kind}\b", name))
    return next(found, len(_PROJECTORS)), name


def _size(files: Iterable[RemoteFile]) -> int:
    return sum(file.size for file in files)
