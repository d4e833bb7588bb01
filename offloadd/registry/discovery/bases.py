"""Which model an adapter is for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from offloadd.registry.discovery.assemble import Draft
from offloadd.state.found import Format

_ODD = re.compile(r"[^a-z0-9]+")


class Bases:
    """The models that these adapters are for, found in one pass: there may be very many of both."""

    def __init__(self, models: Sequence[Draft], adapters: Sequence[Draft]) -> None:
        """Of these models, those that are whole."""
        sound = [model for model in models if model.shape and not model.facts.problem]
        self._folders = _Folders([model for model in sound if model.format is Format.SAFETENSORS])
        self._beside: dict[tuple[str, str], list[Draft]] = {}
        self._called: dict[tuple[str, str], list[Draft]] = {_wanted(adapter): [] for adapter in adapters}
        self._lengths = {len(wanted) for _, wanted in self._called if wanted}
        for model in sound:
            if model.format is Format.GGUF and model.shape:
                self._add(model, model.shape.architecture, model.shape.name)

    def of(self, adapter: Draft) -> Draft | None:
        """The model that an adapter is for: of its architecture, and of the name that it gives, or the only one beside it."""
        if adapter.shape is None:
            return None
        if adapter.format is Format.SAFETENSORS:
            return self._folders.of(adapter, adapter.shape.base)
        architecture, wanted = _wanted(adapter)
        if wanted:
            fitting = self._called[architecture, wanted]
        else:
            beside = self._beside.get((architecture, adapter.folder), [])
            fitting = beside if len(beside) == 1 else []
        return _nearest(adapter, fitting)

    def _add(self, model: Draft, architecture: str, title: str) -> None:
        """Among those beside it, and among those that have a name which begins as an adapter wants it."""
        self._beside.setdefault((architecture, model.folder), []).append(model)
        if not self._lengths:
            return
        names = {_plain(name) for name in (title, model.stem, PurePosixPath(model.folder).name)}
        for begin in {name[:length] for name in names for length in self._lengths if len(name) >= length}:
            if (architecture, begin) in self._called:
                self._called[architecture, begin].append(model)


def _wanted(adapter: Draft) -> tuple[str, str]:
    """Architecture and name of the base of an adapter."""
    return (adapter.shape.architecture, _plain(adapter.shape.base)) if adapter.shape else ("", "")


class _Folders:
    """Models in Hugging Face's layout, by where they lie and by what they are called."""

    def __init__(self, models: Sequence[Draft]) -> None:
        self._called: dict[str, list[Draft]] = {}
        for model in models:
            for name in {model.path, *(alias.lower() for alias in model.aliases), _plain(model.stem)}:
                self._called.setdefault(name, []).append(model)

    def of(self, adapter: Draft, wanted: str) -> Draft | None:
        """The one that lies where the adapter's own config says, or is the repository that it names, or is called like that.

        A path of the machine that it was trained on says no more than its last part does.
        """
        at = os.path.normpath(PurePosixPath(adapter.folder, wanted)) if wanted else ""
        last = _plain(PurePosixPath(wanted).name)
        for name in (at, wanted.lower(), last):
            found = _nearest(adapter, self._called.get(name, ()) if name else ())
            if found is not None:
                return found
        return None


def _nearest(adapter: Draft, models: Iterable[Draft]) -> Draft | None:
    return min(models, key=lambda model: (model.folder != adapter.folder, model.store != adapter.store, model.path), default=None)


def _plain(text: str) -> str:
    return _ODD.sub("", text.lower())
