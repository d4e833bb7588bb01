"""Entries of `models` that are written as they were in the last config: what came of them then is what would come of them now.

Of a thousand models a reload mostly touches one. Only an entry that says nothing beyond itself is known: none that raised a
finding, whose place may have moved; none that holds a secret, whose line is hidden; none with `${…}`, which may stand for something
else by now. What spans entries (a name that two of them take, a key written twice) is looked at in every config anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from offloadd.config.nodes import Entry, Node
from offloadd.config.schema import ConfigFile, ModelSection
from offloadd.config.secrets import secret_nodes
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import ModelName

MODELS = "models"
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Known:
    """One entry: how it is written, what it was read as, and how it is shown."""

    text: str
    section: ModelSection
    spec: ModelSpec
    shown: Any


@dataclass(frozen=True, slots=True)
class Basis:
    """What an entry's meaning depends on beside its own text."""

    schema: type[ConfigFile] | None = None
    """The adapters' fields; the same adapters give the same class."""
    engines: tuple[tuple[str, int], ...] = ()
    """Every engine's name and preference."""
    pinned: bool = False
    """Whether hub ids need a commit."""


@dataclass(frozen=True, slots=True)
class Former:
    """What is kept of one config for the reading of the next."""

    basis: Basis = field(default_factory=Basis)
    models: Mapping[str, Known] = field(default_factory=dict)

    def same(self, texts: Mapping[str, str], schema: type[ConfigFile]) -> Mapping[str, Known]:
        """The entries that are written as they were, by name. Whether their engines are what they were is seen later."""
        if self.basis.schema is not schema:
            return {}
        known = self.models
        return {name: known[name] for name, text in texts.items() if name in known and known[name].text == text}


def texts_of(root: Node) -> dict[str, str]:
    """Every entry of `models` that can be known, as a text that tells even 1 from true and from 1.0."""
    texts = {name: json.dumps(_plain(entry.node)) for name, entry in entries_of(root).items()}
    return {name: text for name, text in texts.items() if "${" not in text}


def remembered(
    root: Node,
    basis: Basis,
    same: Mapping[str, Known],
    texts: Mapping[str, str],
    sections: Mapping[str, ModelSection],
    specs: Mapping[ModelName, ModelSpec],
    shown: Mapping[str, Any],
) -> Former:
    """What to keep of a config that has been read; `texts` are those of the entries of which there was nothing to say."""
    entries = entries_of(root)
    kept: dict[str, Known] = {}
    for name, text in texts.items():
        spec = specs[ModelName(name)]
        if name in same and same[name].spec is spec:
            kept[name] = same[name]
        elif not any(secret_nodes(entries[name].node, name)):
            kept[name] = Known(text, sections[name], spec, shown[MODELS][name])
    return Former(basis, kept)


def without(root: Node, same: Mapping[str, object]) -> Node:
    """The tree without these models."""
    if not same or not isinstance(root.value, dict):
        return root
    models = root.value[MODELS]
    left = {name: entry for name, entry in entries_of(root).items() if name not in same}
    return root._replace(value={**root.value, MODELS: models._replace(node=models.node._replace(value=left))})


def put_back(data: dict[str, Any], root: Node, same: Mapping[str, _Value]) -> None:
    """Into what was made of the tree without these models, put what is known of them, each in its place."""
    if same:
        made = data[MODELS]
        data[MODELS] = {name: same[name] if name in same else made[name] for name in entries_of(root)}


def entries_of(root: Node) -> Mapping[str, Entry]:
    """What is written under `models`, if that is a mapping."""
    models = root.value.get(MODELS) if isinstance(root.value, dict) else None
    return models.node.value if models and isinstance(models.node.value, dict) else {}


def _plain(node: Node) -> Any:
    value = node.value
    if isinstance(value, dict):
        return {name: _plain(entry.node) for name, entry in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
