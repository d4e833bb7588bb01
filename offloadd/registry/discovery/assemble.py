"""One folder's files to the models that they are: parts of a split one joined, companions told from models."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from offloadd.registry.content import SHARD
from offloadd.registry.discovery.headers import Headers
from offloadd.registry.discovery.names import proper_aliases, repository_of, slug, uncached
from offloadd.registry.discovery.stores import HUB, LLAMACPP
from offloadd.registry.discovery.tree import Folder, Mark
from offloadd.state.found import Format
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes

MODEL, PROJECTOR, ADAPTER = "model", "mmproj", "adapter"
_UNFINISHED = (".part", ".partial", ".aria2", ".crdownload", ".download", ".incomplete")
_EVERYBODYS = re.compile(r"mmproj|model|gguf|b?f\d+|fp\d+|i?q\d.*|[kmsl]|\d+(?:x\d+)?[bm]?|it|instruct|chat|base|v\d+|ud|vision|vl")
_PREFERRED = ("F16", "BF16", "Q8_0", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One model, projector or adapter, as its own folder shows it."""

    kind: str
    store: str
    folder: str
    format: Format
    stem: str
    """Its file's name without the ending, its folder's, or what its store calls it."""
    facts: ModelFacts
    mark: tuple[int, int]
    """Device and inode of its first file, whichever name leads to it."""
    aliases: tuple[str, ...] = ()
    projector: ModelFacts | None = None

    @property
    def path(self) -> str:
        """Where it lies."""
        return self.facts.path

    @property
    def shape(self) -> ModelShape | None:
        """What its header says."""
        return self.facts.shape


@dataclass(frozen=True, slots=True)
class _Files:
    """A file, or all parts of a split one that are there."""

    stem: str
    paths: tuple[str, ...]
    marks: tuple[Mark, ...]
    missing: str = ""

    @property
    def name(self) -> str:
        """Of the first."""
        return self.paths[0].rpartition("/")[2]


def drafts_of(folder: Folder, headers: Headers) -> list[Draft]:
    """Everything in the folder that is a model or belongs to one."""
    present = frozenset(folder.names)
    found = [_gguf(folder, files, present, headers) for files in _gguf_files(folder)]
    found += _weights(folder, headers)
    found += [_troubled(folder, name, why) for name, why in folder.troubles.items() if name.lower().endswith(".gguf")]
    models = [draft for draft in found if draft.kind == MODEL]
    projectors = [draft for draft in found if draft.kind == PROJECTOR and not draft.facts.problem]
    rest = [draft for draft in found if draft.kind == ADAPTER]
    return [*_paired(models, projectors), *rest]


def _gguf_files(folder: Folder) -> Iterator[_Files]:
    parts: dict[tuple[str, int], dict[int, tuple[str, Mark]]] = {}
    for name, path, mark in zip(folder.names, folder.paths, folder.marks, strict=True):
        if not name.lower().endswith(".gguf"):
            continue
        shard = SHARD.fullmatch(name)
        if shard is None:
            yield _Files(name[:-5], (path,), (mark,))
        else:
            parts.setdefault((shard["stem"], int(shard["count"])), {})[int(shard["number"])] = (path, mark)
    for (stem, count), known in parts.items():
        missing = [number for number in range(1, min(count, 1024) + 1) if number not in known]
        said = f"part {missing[0]} of {count} is missing" if missing else ""
        ordered = [known[number] for number in sorted(known)]
        yield _Files(stem, tuple(path for path, _ in ordered), tuple(mark for _, mark in ordered), said)


def _gguf(folder: Folder, files: _Files, present: frozenset[str], headers: Headers) -> Draft:
    begun = next((f"{name}{ending}" for ending in _UNFINISHED if (name := files.name) + ending in present), None)
    if files.missing or begun:
        problem = files.missing or f"is still being downloaded ({begun} is there)"
        facts = ModelFacts(
            path=files.paths[0],
            size=Bytes(sum(mark[1] for mark in files.marks)),
            problem=problem,
            hint="wait for the rest, or download it again",
        )
    else:
        facts = headers.facts(files.paths[0], files.paths, files.marks)
    kind = facts.shape.kind if facts.shape else MODEL
    if kind == MODEL and facts.shape and not facts.shape.parameters:
        kind = "vocabulary"
    return _draft(folder, files.stem, kind, Format.GGUF, facts, files.marks[0])


def _draft(folder: Folder, stem: str, kind: str, form: Format, facts: ModelFacts, mark: Mark) -> Draft:
    stem = uncached(stem) if folder.store.kind == LLAMACPP else stem
    return Draft(
        kind=kind,
        store=folder.store.kind,
        folder=folder.path,
        format=form,
        stem=stem,
        facts=facts,
        mark=(mark[3], mark[2]),
        aliases=proper_aliases(_aliases(folder, stem, form, facts.shape), slug(stem, facts.path)),
    )


def _aliases(folder: Folder, stem: str, form: Format, shape: ModelShape | None) -> Iterator[str]:
    yield stem
    repository = _repository(folder)
    if repository and form is Format.GGUF:
        quantization = _named_quantization(stem) or (shape.quantization if shape else "")
        yield f"{repository}:{quantization}" if quantization else repository
    elif repository:
        yield repository


def _named_quantization(stem: str) -> str:
    found = re.search(r"(?:^|[-._])((?:UD-)?(?:I?Q\d[A-Z0-9_]*|BF16|F16|F32|MXFP4[A-Z_]*|TQ\d_0))$", stem, re.IGNORECASE)
    return found[1].upper() if found else ""


def _repository(folder: Folder) -> str:
    """`ORG/NAME` where the folders say it: in the hub's cache, and wherever people keep its layout."""
    below = PurePosixPath(folder.path).relative_to(folder.store.path).parts if _is_below(folder) else ()
    if folder.store.kind == HUB:
        return repository_of(below[0]) if below else ""
    return "/".join(below) if len(below) == 2 else ""


def _is_below(folder: Folder) -> bool:
    return folder.path.startswith(folder.store.path.rstrip("/") + "/")


def _weights(folder: Folder, headers: Headers) -> Iterator[Draft]:
    """A folder in Hugging Face's layout is one model, or one adapter."""
    chosen = [
        (name, path, mark)
        for name, path, mark in zip(folder.names, folder.paths, folder.marks, strict=True)
        if not name.lower().endswith((".gguf", *_UNFINISHED))
    ]
    names = [name for name, _, _ in chosen]
    weights = [entry for entry in chosen if entry[0].endswith(".safetensors")]
    if not weights:
        return
    stem = _folder_stem(folder)
    marks = tuple(mark for _, _, mark in chosen)
    if "adapter_config.json" in names:
        parts = [path for name, path, _ in chosen if name.endswith(".safetensors") or name == "adapter_config.json"]
        facts = headers.facts(folder.path, parts, marks)
        yield _draft(folder, stem, ADAPTER, Format.SAFETENSORS, facts, weights[0][2])
    elif "config.json" in names:
        parts = [path for name, path, _ in chosen if name.endswith(".safetensors") or name == "config.json"]
        facts = headers.facts(folder.path, parts, marks)
        yield _draft(folder, stem, MODEL, Format.SAFETENSORS, facts, weights[0][2])


def _folder_stem(folder: Folder) -> str:
    repository = _repository(folder)
    return repository.rpartition("/")[2] if repository else PurePosixPath(folder.path).name


def _troubled(folder: Folder, name: str, why: str) -> Draft:
    path = f"{folder.path}/{name}"
    facts = ModelFacts(path=path, problem=why, hint="see what became of the file that it should be")
    return _draft(folder, name[:-5], MODEL, Format.GGUF, facts, (0, 0, -1, -1))


def _paired(models: Sequence[Draft], projectors: Sequence[Draft]) -> Iterator[Draft]:
    """Each model with the projector that is made for it, where there is one in its folder."""
    families = {(draft.shape.architecture, draft.shape.embedding) for draft in models if draft.shape}
    for model in models:
        fitting = [each for each in projectors if _fits(model, each, is_only_family=len(families) == 1)]
        best = min(fitting, key=lambda each: _rank(model, each), default=None)
        senses = best.shape.senses or ("vision",) if best and best.shape else ()
        if best is None or model.shape is None:
            yield model
        else:
            shape = replace(model.shape, senses=senses)
            yield replace(model, facts=replace(model.facts, shape=shape), projector=best.facts)


def _fits(model: Draft, projector: Draft, *, is_only_family: bool) -> bool:
    if model.format is not Format.GGUF or model.shape is None or projector.shape is None or model.shape.causal is False:
        return False
    if projector.shape.projection and model.shape.embedding and projector.shape.projection != model.shape.embedding:
        return False
    return is_only_family or bool(_words(model.stem) & _words(projector.stem))


def _rank(model: Draft, projector: Draft) -> tuple[int, int, str]:
    quantization = projector.shape.quantization if projector.shape else ""
    preference = _PREFERRED.index(quantization) if quantization in _PREFERRED else len(_PREFERRED)
    return -len(_words(model.stem) & _words(projector.stem)), preference, projector.path


@functools.lru_cache(maxsize=4096)
def _words(stem: str) -> frozenset[str]:
    """What a name says of the family; sizes, quantizations and what many are called say nothing."""
    return frozenset(word for word in re.split(r"[-_.]+", stem.lower()) if word and not _EVERYBODYS.fullmatch(word))
