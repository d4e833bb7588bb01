"""A walk over folders that knows what has changed since the last one. A folder is listed again only when its own date changed.

What cannot be looked at now is as it was: a disk that is away for a moment has not lost its models.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from offloadd.registry.discovery.glance import Glance
from offloadd.registry.discovery.stores import HUB, OLLAMA, Store

MAX_FILES = 100_000
MAX_FOLDERS = 20_000
MAX_LISTED = 1_000_000
"""Entries of any kind that are passed over in one walk."""
MAX_DEPTH = 16
_ENDINGS = (".gguf", ".safetensors", ".part", ".partial", ".aria2", ".crdownload", ".download", ".incomplete")
_NAMES = frozenset(
    {
        "config.json",
        "adapter_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "modules.json",
        "model.safetensors.index.json",
        "README.md",
    }
)
_ODD_NAME = "its name is not valid UTF-8: rename it"
_BLURRED_S = 2.0
"""A folder that changed so shortly before it was listed may change again and keep its date: it is listed again."""

Mark = tuple[int, int, int, int]
"""Date of change in nanoseconds, size, inode and device: another one means that a file may be another."""


@dataclass(slots=True)
class Folder:
    """What is of interest in one folder, in the order of names."""

    store: Store
    path: str
    depth: int
    key: tuple[int, int]
    """Device and inode."""
    changed_ns: int = 0
    is_sure: bool = False
    """Whether its date tells all changes of its list from now on."""
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    hashes: list[int | None] = field(default_factory=list)
    """Of what `stat` last said, for a comparison at once; None of one that changed so lately that whole seconds do not tell."""
    folders: list[str] = field(default_factory=list)
    troubles: dict[str, str] = field(default_factory=dict)
    """By name: what is wrong with an entry that looks like a model."""


@dataclass(slots=True, kw_only=True)
class Look:
    """One walk."""

    folders: list[Folder]
    changed: set[str]
    """Paths of folders whose files are others than at the last walk."""
    problems: dict[str, str]
    """By path: folders that could not be looked at, and bounds that were reached."""
    is_same: bool = False
    """Whether nothing at all is other than at the last walk, so that there is nothing to work out."""


class Tree:
    """Remembers the last walk."""

    def __init__(self) -> None:
        self._known: dict[str, Folder] = {}
        self._roots: dict[str, int] = {}
        """Device of each store's folder when it last held something."""
        self._last: tuple[Sequence[Store], Look, Glance] | None = None
        """The last walk, where a glance will tell whether all is as it was."""

    def look(self, stores: Sequence[Store]) -> Look:
        """Walk through all stores, or see that nothing has changed since the last walk. Blocks."""
        if self._last is not None and self._last[0] == stores and self._last[2].is_same():
            return self._last[1]
        walk = _Walk(self._known, self._roots)
        for store in stores:
            walk.store(store)
        if walk.has_listed or len(walk.folders) != len(self._known):
            self._known = {folder.path: folder for folder in walk.folders}
        still = Look(folders=walk.folders, changed=set(), problems={}, is_same=True)
        self._last = (list(stores), still, Glance(walk.seen(), walk.absent)) if walk.is_settled() else None
        return Look(folders=walk.folders, changed=walk.changed, problems=walk.problems)


class _Walk:
    """One walk in progress."""

    def __init__(self, known: dict[str, Folder], roots: dict[str, int]) -> None:
        self._known, self._roots = known, roots
        self._seen: set[tuple[int, int]] = set()
        self._files = self._listed = 0
        self.has_listed = False
        """Whether any folder was listed, and so is held by another object."""
        self.absent: list[str] = []
        """Stores that are not there."""
        self._entered: list[tuple[str, int]] = []
        """Every folder that was come to, on each way, with a hash of what `stat` said of it."""
        self._is_odd = False
        """Whether a folder went away in this moment."""
        self.folders: list[Folder] = []
        self.changed: set[str] = set()
        self.problems: dict[str, str] = {}

    def is_settled(self) -> bool:
        """Whether every later change will show in the whole seconds of a date, or in another number that `stat` tells."""
        settled = not self._is_odd and not self.problems
        return settled and all(folder.is_sure and None not in folder.hashes for folder in self.folders)

    def seen(self) -> Iterator[tuple[str, int]]:
        """Everything that was looked at, by path."""
        yield from self._entered
        for folder in self.folders:
            yield from zip(folder.paths, (known or 0 for known in folder.hashes), strict=True)

    def store(self, store: Store) -> None:
        """Walk through one store."""
        path = store.path
        try:
            about = os.stat(path)  # noqa: PTH116  (strings throughout: this is the hot path)
        except OSError as error:
            self.absent.append(path)
            self._keep_store(path, f"cannot be looked at: {error.strerror}")
            return
        if self._roots.get(path, about.st_dev) != about.st_dev and not _has_entries(path):
            self._keep_store(path, "is empty and on another disk than before: is something not mounted?")
            return
        before = len(self.folders)
        self._descend(store, path, about)
        if any(folder.marks for folder in self.folders[before:]):
            self._roots[path] = about.st_dev

    def _keep_store(self, path: str, problem: str) -> None:
        """It is as it was; one that never held anything is none of our business."""
        kept = [folder for folder in self._known.values() if folder.path == path or folder.path.startswith(path + "/")]
        if any(folder.marks for folder in kept):
            self.folders += kept
            self._seen.update(folder.key for folder in kept)
            self.problems[path] = f"{problem}; its models are taken to be as they were"

    def _descend(self, store: Store, root: str, about: os.stat_result) -> None:
        waiting: list[tuple[str, int, os.stat_result | None]] = [(root, 0, about)]
        while waiting:
            path, depth, known = waiting.pop()
            folder = self._visit(store, path, depth, known)
            if folder is not None and depth < MAX_DEPTH:
                waiting += [(below, depth + 1, None) for below in reversed(folder.folders)]

    def _visit(self, store: Store, path: str, depth: int, about: os.stat_result | None) -> Folder | None:
        """Look at one folder, unless it was seen on another way: symbolic links may lead round in circles."""
        folder = known = self._known.get(path)
        try:
            about = about or os.stat(path)  # noqa: PTH116
            key = (about.st_dev, about.st_ino)
            self._entered.append((path, hash(about)))
            if key in self._seen:
                return None
            self._seen.add(key)
            if len(self.folders) >= MAX_FOLDERS or self._files > MAX_FILES or self._listed > MAX_LISTED:
                self.problems[store.path] = f"has more than the {MAX_FOLDERS} folders or {MAX_FILES} model files that are looked at"
                return None
            if known is None or known.key != key or known.changed_ns != about.st_mtime_ns or not known.is_sure:
                folder = self._list(Folder(store, path, depth, key, about.st_mtime_ns), known)
            else:
                folder = self._check(known)
        except FileNotFoundError:
            self._is_odd = True
            return None
        except OSError as error:
            self.problems[path] = f"cannot be looked at: {error.strerror}"
        if folder is not None:
            self.folders.append(folder)
            self._files += len(folder.marks)
        return folder

    def _check(self, folder: Folder) -> Folder:
        """Its list is as it was: are its files? A walk that finds nothing new spends its time here, nearly all in `stat`."""
        try:
            fresh = list(map(os.stat, folder.paths))
        except OSError:  # it is listed again, which tells what has become of it
            return self._list(Folder(folder.store, folder.path, folder.depth, folder.key, folder.changed_ns), folder)
        if list(map(hash, fresh)) != folder.hashes:
            self._compare(folder, fresh)
        return folder

    def _compare(self, folder: Folder, fresh: list[os.stat_result]) -> None:
        """Which files are others; a stat that differs may have been read meanwhile, and no more."""
        now_ns = time.time_ns()
        for index, about in enumerate(fresh):
            mark = (about.st_mtime_ns, about.st_size, about.st_ino, about.st_dev)
            if mark != folder.marks[index]:
                folder.marks[index] = mark
                self.changed.add(folder.path)
            folder.hashes[index] = hash(about) if _is_settled(about, now_ns) else None

    def _list(self, folder: Folder, known: Folder | None) -> Folder:
        self.has_listed = True
        now_ns = time.time_ns()
        folder.is_sure = abs(now_ns - folder.changed_ns) > _BLURRED_S * 1e9
        with os.scandir(folder.path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        self._listed += len(listed)
        before = {} if known is None else dict(zip(known.paths, known.marks, strict=True))
        for entry in listed[: MAX_FILES + 1]:
            if not entry.name.startswith("."):
                self._take(folder, entry, before)
        same = known is not None and (known.paths, known.marks, known.troubles) == (folder.paths, folder.marks, folder.troubles)
        if not same:
            self.changed.add(folder.path)
        return folder

    def _take(self, folder: Folder, entry: os.DirEntry[str], before: dict[str, Mark]) -> None:
        """One entry: a folder to go into, a file of interest, or nothing."""
        try:
            if entry.is_dir():
                if not _is_passed_over(folder, entry.name):
                    folder.folders.append(entry.path)
                return
            if not _is_of_interest(folder, entry.name):
                return
            entry.name.encode()
            about = _regular(entry)
        except UnicodeEncodeError:
            folder.troubles[ascii(entry.name)[1:-1]] = _ODD_NAME
        except OSError as error:
            self._trouble(folder, entry, before, error)
        else:
            if about is None:
                folder.troubles[entry.name] = "is not a regular file"
            else:
                mark = (about.st_mtime_ns, about.st_size, about.st_ino, about.st_dev)
                _add(folder, entry, mark, hash(about) if _is_settled(about, time.time_ns()) else None)

    def _trouble(self, folder: Folder, entry: os.DirEntry[str], before: dict[str, Mark], error: OSError) -> None:
        """An entry that cannot be looked at: it is as it was, or it is told what is wrong with it."""
        if not _is_of_interest(folder, entry.name) or (error.errno == errno.ENOENT and not entry.is_symlink()):
            return
        folder.is_sure = False  # what is wrong may pass elsewhere: where a link leads to, or on a disk that answers again
        if error.errno == errno.ENOENT:
            folder.troubles[entry.name] = "is a link to a file that is not there"
        elif error.errno != errno.ELOOP and entry.path in before:
            _add(folder, entry, before[entry.path], None)
        else:
            folder.troubles[entry.name] = f"cannot be looked at: {error.strerror}"


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for what is no regular file."""
    about = os.stat(entry.path)  # noqa: PTH116
    return about if stat.S_ISREG(about.st_mode) else None


def _is_settled(about: os.stat_result, now_ns: int) -> bool:
    """Whether another change would show in whole seconds."""
    return abs(now_ns - about.st_mtime_ns) > _BLURRED_S * 1e9 and abs(now_ns - about.st_ctime_ns) > _BLURRED_S * 1e9


def _add(folder: Folder, entry: os.DirEntry[str], mark: Mark, known: int | None) -> None:
    folder.names.append(entry.name)
    folder.paths.append(entry.path)
    folder.marks.append(mark)
    folder.hashes.append(known)


def _is_passed_over(folder: Folder, name: str) -> bool:
    """Whether to go into a folder: not where a store keeps the same again, under names that say nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:
        folder.troubles[ascii(name)[1:-1]] = _ODD_NAME
        return True
    return folder.store.kind == HUB and name in ("blobs", "refs")


def _is_of_interest(folder: Folder, name: str) -> bool:
    return folder.store.kind == OLLAMA or name.lower().endswith(_ENDINGS) or name in _NAMES


def _has_entries(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return any(True for _ in entries)
    except OSError:
        return False
