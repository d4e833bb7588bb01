"""One look at all stores: which models there are now. What did not change costs no more than looking at its files' dates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from offloadd import lasting
from offloadd.registry.discovery.assemble import ADAPTER, MODEL, Draft, drafts_of
from offloadd.registry.discovery.bases import Bases
from offloadd.registry.discovery.headers import Headers
from offloadd.registry.discovery.names import assign, proper_aliases, slug
from offloadd.registry.discovery.ollama import Manifests
from offloadd.registry.discovery.stores import HUB, OLLAMA, Store
from offloadd.registry.discovery.tree import Folder, Look, Tree
from offloadd.state.found import Found, Shelf
from offloadd.state.ids import ModelName
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import ModelShape

_NO_FILE = (-1, -1)
"""The mark of what could not be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one look found. The same object as the last one when nothing has changed."""

    found: Mapping[str, Found] = field(default_factory=dict)
    """By path."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """By path: stores and folders that could not be looked at."""
    folders: frozenset[str] = frozenset()
    """Every folder that was looked into, to be watched."""
    files: int = 0
    due: float | None = None
    """In how many seconds to look again, though nothing changes: a file that is being written will have settled."""


class Scanner:
    """Looks again and again. Everything blocks: one call at a time, in a thread."""

    def __init__(self, read_shape: Callable[[Path], ModelShape], shelf: Shelf | None = None) -> None:
        self._tree = Tree()
        self._headers = Headers(read_shape)
        self._manifests = Manifests()
        self._drafts: dict[str, list[Draft]] = {}
        self._restless: set[str] = set()
        """Folders and stores that something was due in at the last look."""
        self._names: dict[str, str] = {}
        self._last = Scan()
        self._is_first = True
        if shelf is not None:
            self._names = {path: str(name) for path, name in shelf.names.items()}
            self._remember(shelf)

    @property
    def read(self) -> int:
        """How many headers were read in all."""
        return self._headers.read

    def scan(self, stores: Sequence[Store]) -> Scan:
        """Look at all of them."""
        look = self._tree.look(stores)
        if look.is_same and not self._restless:
            return self._last
        self._headers.due.clear()
        drafts, anything = self._all_drafts(stores, look)
        if not anything and not self._is_first and look.problems == self._last.problems:
            return self._last
        self._is_first = False
        found = self._named([draft for draft in _once(_current(drafts)) if draft.kind in (MODEL, ADAPTER)])
        paths = {draft.path for draft in drafts} | {draft.projector.path for draft in drafts if draft.projector}
        self._headers.forget(dict.fromkeys(paths))
        self._last = Scan(
            found=found,
            problems=look.problems,
            folders=frozenset(folder.path for folder in look.folders),
            files=sum(len(folder.marks) for folder in look.folders),
            due=min(self._headers.due, default=None),
        )
        return self._last

    def _remember(self, shelf: Shelf) -> None:
        self._last = Scan(found=shelf.present)
        for found in shelf.present.values():
            for facts in (found.facts, found.projector):
                if facts is not None:
                    self._headers.remember(facts)

    def _all_drafts(self, stores: Sequence[Store], look: Look) -> tuple[list[Draft], bool]:
        """Everything there is, and whether any of it was worked out anew."""
        restless, self._restless = self._restless, set()
        before, self._drafts = self._drafts, {}
        drafts: list[Draft] = []
        anew = len(before)
        for unit, changed, make in self._units(stores, look):
            waiting = len(self._headers.due)
            if unit in before and not changed and unit not in restless:
                anew -= 1
                self._drafts[unit] = before[unit]
            else:
                self._drafts[unit] = make()
                anew += unit not in before
            if len(self._headers.due) > waiting:
                self._restless.add(unit)
            drafts += self._drafts[unit]
        return drafts, anew > 0

    def _units(self, stores: Sequence[Store], look: Look) -> Iterator[tuple[str, bool, Callable[[], list[Draft]]]]:
        """What is worked out as a whole: a folder, or all of an Ollama store."""
        kept = {store.path: store for store in stores if store.kind == OLLAMA}
        folders: dict[str, list[Folder]] = {path: [] for path in kept}
        for folder in look.folders:
            if folder.store.path in kept and folder.store.kind == OLLAMA:
                folders[folder.store.path].append(folder)
            else:
                yield folder.path, folder.path in look.changed, lambda folder=folder: drafts_of(folder, self._headers)  # type: ignore[misc]
        for path, own in folders.items():
            changed = any(folder.path in look.changed for folder in own)
            store = kept[path]
            yield path, changed, lambda store=store, own=own: list(self._manifests.drafts(store, own, self._headers))  # type: ignore[misc]

    def _named(self, drafts: Sequence[Draft]) -> dict[str, Found]:
        names = assign({draft.path: slug(draft.stem, draft.path) for draft in drafts}, self._names)
        self._names.update(names)
        lent = [draft for draft in drafts if draft.kind == ADAPTER]
        known = Bases([draft for draft in drafts if draft.kind == MODEL], lent)
        bases = {draft.path: known.of(draft) for draft in lent}
        adapters: dict[str, list[str]] = {}
        for path, base in bases.items():
            if base is not None:
                adapters.setdefault(base.path, []).append(path)
        found = {}
        before = self._last.found
        for draft in drafts:
            is_adapter = draft.kind == ADAPTER
            base = bases.get(draft.path)
            new = Found(
                name=ModelName(names[draft.path]),
                store=draft.store,
                format=draft.format,
                facts=_without_base(draft) if is_adapter and base is None else draft.facts,
                aliases=draft.aliases,
                projector=draft.projector,
                base=base.facts if base else None,
                adapters=tuple(adapters.get(draft.path, ())),
                is_adapter=is_adapter,
            )
            old = before.get(draft.path)
            if old is None or old != new:
                lasting.made()
                old = new
            found[draft.path] = old  # the same object where it is the same: whoever has that has nothing to do
        return found


def _current(drafts: Sequence[Draft]) -> Iterator[Draft]:
    """Of several revisions in the hub's cache only the one that its `main` points to, where that is there."""
    revisions: dict[str, set[str]] = {}
    for draft in drafts:
        repository, revision = _revision(draft)
        if repository:
            revisions.setdefault(repository, set()).add(revision)
    mains = {repository: _main(repository) for repository, known in revisions.items() if len(known) > 1}
    for draft in drafts:
        repository, revision = _revision(draft)
        main = mains.get(repository, "")
        if not main or main not in revisions[repository] or main == revision:
            yield draft


def _revision(draft: Draft) -> tuple[str, str]:
    """The repository's folder and the revision."""
    before, found, after = draft.path.partition("/snapshots/")
    return (before, after.partition("/")[0]) if draft.store == HUB and found else ("", "")


def _main(repository: str) -> str:
    try:
        with Path(repository, "refs", "main").open("rb") as file:
            return file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _once(drafts: Iterator[Draft]) -> list[Draft]:
    """A file that several names lead to counts once, under the first of them; the others become aliases."""
    kept: dict[tuple[int, ...], Draft] = {}
    for draft in drafts:
        key = draft.mark if draft.mark != _NO_FILE else (hash(draft.path),)
        first = kept.setdefault(key, draft)
        if first is not draft:
            name = slug(first.stem, first.path)
            more = proper_aliases((*first.aliases, slug(draft.stem, draft.path), *draft.aliases), name)
            kept[key] = replace(first, aliases=more)
    return list(kept.values())


def _without_base(draft: Draft) -> ModelFacts:
    if draft.facts.problem:
        return draft.facts
    named = f' "{draft.shape.base}"' if draft.shape and draft.shape.base else ""
    return replace(
        draft.facts, problem=f"is an adapter, and its base model{named} was not found", hint="put the base model beside it"
    )
