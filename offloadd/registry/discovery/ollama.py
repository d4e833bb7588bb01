"""Ollama's store: manifests say which blobs make up a model, and what it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import msgspec

from offloadd.registry.discovery.assemble import MODEL, Draft
from offloadd.registry.discovery.headers import Headers
from offloadd.registry.discovery.names import proper_aliases, slug
from offloadd.registry.discovery.stores import Store
from offloadd.registry.discovery.tree import Folder, Mark
from offloadd.registry.readers import HeaderError
from offloadd.registry.readers.source import open_source
from offloadd.state.found import Format
from offloadd.state.launch import ModelFacts

MAX_MANIFEST = 2**20
_PREFIX = "application/vnd.ollama.image."


class _Layer(msgspec.Struct):
    digest: str
    mediaType: str = ""  # noqa: N815  (as the file spells it)


class _Manifest(msgspec.Struct):
    layers: list[_Layer] = []


class Manifests:
    """Reads manifests, each once for as long as it stays what it is."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Mark, _Manifest | str]] = {}

    def drafts(self, store: Store, folders: list[Folder], headers: Headers) -> Iterator[Draft]:
        """The models of one store."""
        blobs = f"{store.path}/blobs"
        files = {path: mark for folder in folders if folder.path == blobs for path, mark in _entries(folder)}
        for folder in folders:
            if folder.path.startswith(f"{store.path}/manifests/"):
                for path, mark in _entries(folder):
                    draft = self._draft(store, path, mark, files, headers)
                    if draft is not None:
                        yield draft

    def _draft(self, store: Store, path: str, mark: Mark, files: Mapping[str, Mark], headers: Headers) -> Draft | None:
        if self._known.get(path, (None, None))[0] != mark:
            self._known[path] = (mark, _read(path))
        manifest = self._known[path][1]
        title = _title(PurePosixPath(path).relative_to(f"{store.path}/manifests").parts)
        if isinstance(manifest, str):
            return _make(store, path, title, ModelFacts(path=path, problem=manifest), mark)
        blob = _blob(store, manifest, "model")
        if blob is None:
            return None
        if blob not in files:
            facts = ModelFacts(path=path, problem="is still being downloaded, or its file is gone", hint=f"ollama pull {title}")
            return _make(store, path, title, facts, mark)
        projector = _blob(store, manifest, "projector")
        draft = _make(store, path, title, headers.facts(blob, (blob,), (files[blob],)), files[blob])
        return _with_projector(draft, projector, files, headers)


def _with_projector(draft: Draft, projector: str | None, files: Mapping[str, Mark], headers: Headers) -> Draft:
    if projector is None or projector not in files or draft.shape is None:
        return draft
    facts = headers.facts(projector, (projector,), (files[projector],))
    if facts.problem or facts.shape is None:
        return draft
    shape = replace(draft.shape, senses=facts.shape.senses or ("vision",))
    return replace(draft, facts=replace(draft.facts, shape=shape), projector=facts)


def _entries(folder: Folder) -> Iterator[tuple[str, Mark]]:
    return zip(folder.paths, folder.marks, strict=True)


def _read(path: str) -> _Manifest | str:
    try:
        with open_source(Path(path), 2 * MAX_MANIFEST) as source:
            return msgspec.json.decode(source.take(source.size, MAX_MANIFEST), type=_Manifest)
    except HeaderError as error:
        return error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "its manifest cannot be understood"


def _blob(store: Store, manifest: _Manifest, kind: str) -> str | None:
    for layer in manifest.layers:
        kind_of, _, digest = layer.digest.partition(":")
        if layer.mediaType == _PREFIX + kind and kind_of == "sha256" and digest.isalnum():
            return f"{store.path}/blobs/sha256-{digest}"
    return None


def _title(parts: tuple[str, ...]) -> str:
    """`model:tag`, with whose it is where it is not of Ollama's own library."""
    *whose, model, tag = parts if len(parts) >= 2 else ("", *parts)
    owner = [part for part in whose[-1:] if part != "library"]
    return f"{'/'.join([*owner, model])}:{tag}"


def _make(store: Store, path: str, title: str, facts: ModelFacts, mark: Mark) -> Draft:
    name, _, tag = title.rpartition(":")
    stem = name if tag == "latest" else f"{name}-{tag}"
    known = [title, name] if tag == "latest" else [title]
    return Draft(
        kind=MODEL,
        store=store.kind,
        folder=PurePosixPath(path).parent.as_posix(),
        format=Format.GGUF,
        stem=stem,
        facts=facts,
        mark=(mark[3], mark[2]),
        aliases=proper_aliases(known, slug(stem, path)),
    )
