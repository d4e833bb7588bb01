"""What a model's `source` means on this machine's disk. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from offloadd.errors import PermanentError
from offloadd.state.launch import ModelFacts
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_SHARDS = 999
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class Sources:
    """Facts of sources; a header is read again only when its file may have changed."""

    def __init__(self, read_shape: Callable[[Path], ModelShape], read_content: Callable[[Path], str]) -> None:
        self._read_shape = read_shape
        self._read_content = read_content
        self._shapes: dict[str, ModelShape | str] = {}
        self._contents: dict[str, str] = {}

    def read(
        self,
        sources: Sequence[str],
        models_path: Sequence[str],
        hubs: Sequence[str] = (),
        known: Mapping[str, ModelFacts] | None = None,
    ) -> dict[str, ModelFacts]:
        """Facts of every source; what is not on disk and looks like a hub id is one. `hubs` are folders of what was downloaded.

        Those that are `known` are taken as they are.
        """
        held = known or {}
        found = {source: held.get(source) or _read(source, models_path, hubs) for source in sources}
        present = {facts.identity for facts in found.values()}
        self._shapes = {identity: shape for identity, shape in self._shapes.items() if identity in present}
        self._contents = {identity: content for identity, content in self._contents.items() if identity in present}
        return {source: facts if source in held else self._look_into(facts) for source, facts in found.items()}

    def _look_into(self, facts: ModelFacts) -> ModelFacts:
        if facts.problem or not facts.identity:
            return facts
        if facts.identity not in self._contents:
            try:
                self._contents[facts.identity] = self._read_content(Path(facts.read_from or facts.path))
            except OSError:
                return facts  # it changes in this moment: the next look tells
        return self._with_shape(replace(facts, content=self._contents[facts.identity]))

    def _with_shape(self, facts: ModelFacts) -> ModelFacts:
        if facts.identity not in self._shapes:
            try:
                self._shapes[facts.identity] = self._read_shape(Path(facts.read_from or facts.path))
            except PermanentError as error:
                self._shapes[facts.identity] = error.message
        shape = self._shapes[facts.identity]
        # A header that we cannot read is for the engine to judge: it may know more, or say better what is wrong.
        return facts if isinstance(shape, str) else replace(facts, shape=shape)


def hub_folders(environments: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Where engines with these variables keep what they download from a hub."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    found = [*(_hub_of(each) for each in environments), f"{cache}/huggingface/hub"]
    return tuple(dict.fromkeys(folder for folder in found if folder))


def _hub_of(env: Mapping[str, str]) -> str:
    home = env.get("HF_HOME")
    return env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or (f"{home}/hub" if home else "")


def _read(source: str, models_path: Sequence[str], hubs: Sequence[str]) -> ModelFacts:
    facts = read_facts(source, models_path)
    return facts if facts.path or _HUB_ID.fullmatch(source) is None else _hub_facts(source, hubs)


def _hub_facts(source: str, hubs: Sequence[str]) -> ModelFacts:
    """What a download has left of it; where there is none, the engine will fetch it."""
    for hub in hubs:
        kept = Path(hub) / f"models--{source.replace('/', '--')}"
        try:
            snapshot = kept / "snapshots" / (kept / "refs" / "main").read_text().strip()
            facts = _facts_of(snapshot)
        except OSError:
            continue
        if not facts.problem:
            return replace(facts, path=source, read_from=facts.path)
    return ModelFacts(path=source, size=Bytes(0))


def read_facts(source: str, models_path: Sequence[str]) -> ModelFacts:
    """Find the file or folder that `source` names, and say what it is or what is wrong with it.

    A relative source is looked for under each folder of `models_path` in turn; it may not leave them.
    """
    places = [Path(source)] if source.startswith("/") else [Path(folder) / source for folder in models_path]
    found = next((place for place in places if _exists(place)), None)
    if found is None:
        looked = ", ".join(str(place) for place in places)
        return ModelFacts(
            problem=f"model file {source} does not exist (looked for {looked})", hint="put it there, or correct source"
        )
    try:
        return _facts_of(found)
    except OSError as error:
        hint = "make it readable for the daemon's user"
        return ModelFacts(path=str(found), problem=f"cannot read {found}: {error.strerror}", hint=hint)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:
        return True  # it is there in some way: opening it will say what is wrong


def _facts_of(path: Path) -> ModelFacts:
    about = path.stat()
    if stat.S_ISDIR(about.st_mode):
        return _sum_up(path, sorted(entry for entry in path.iterdir() if entry.is_file()))
    if not stat.S_ISREG(about.st_mode):
        return ModelFacts(path=str(path), problem=f"{path} is not a regular file", hint="name the model's own file in source")
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard["count"]) <= _MAX_SHARDS:
        count = int(shard["count"])
        names = [f"{shard['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        return _sum_up(path.with_name(names[0]), [path.with_name(name) for name in names])
    return _sum_up(path, [path])


def _sum_up(path: Path, parts: Iterable[Path]) -> ModelFacts:
    """Facts of a model that is all of `parts`; opening each shows that it can be read."""
    size = 0
    marks: list[str] = []
    for part in parts:
        try:
            with part.open("rb") as file:
                about = os.fstat(file.fileno())
        except FileNotFoundError:
            hint = "all parts of a split model must be beside each other"
            return ModelFacts(path=str(path), problem=f"{part.name} is missing from the split model", hint=hint)
        size += about.st_size
        marks.append(f"{about.st_dev:x}:{about.st_ino:x}:{about.st_size:x}:{about.st_mtime_ns:x}")
    if not size:
        return ModelFacts(path=str(path), problem=f"{path} is empty", hint="copy or download the file again")
    return ModelFacts(path=str(path), size=Bytes(size), identity="|".join(marks))
