"""Config text in, a DesiredState or located diagnostics out.

`load` is pure; `read_sources` and `SystemSecrets` touch the disk. Nothing here runs anything.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offloadd.backends.base import Backend
from offloadd.config.decode import decode
from offloadd.config.diagnostics import Diagnostic, Severity, note, render_json, render_text
from offloadd.config.files import ConfigUnreadableError, SystemSecrets, read_sources
from offloadd.config.known import Former, Known, put_back, remembered, texts_of, without
from offloadd.config.nodes import Node
from offloadd.config.publish import json_schema
from offloadd.config.resolve import Trouble, resolve
from offloadd.config.secrets import Secrets, secret_nodes, shown
from offloadd.config.sections import config_model
from offloadd.config.source import Mark, SourceText
from offloadd.config.syntax import parse_all
from offloadd.state.desired import DesiredState

__all__ = (
    "ConfigUnreadableError",
    "Diagnostic",
    "Loaded",
    "Mark",
    "Secrets",
    "Severity",
    "SourceText",
    "SystemSecrets",
    "json_schema",
    "load",
    "read_sources",
    "render_json",
    "render_text",
)

_MAX_DIAGNOSTICS = 200


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one config gave. `desired` is None when any diagnostic is an error."""

    desired: DesiredState | None
    diagnostics: tuple[Diagnostic, ...]
    """In the order of the files and of the places in them."""
    shown: dict[str, Any]
    """The config as written: `${…}` not filled in, literal secrets as `***`. Empty when it could not be parsed."""
    sources: tuple[SourceText, ...]
    hidden: frozenset[tuple[str, int]] = field(default_factory=frozenset)
    """(file, line) of lines that hold a literal secret and are never printed."""
    secrets: frozenset[str] = field(default_factory=frozenset, repr=False)
    """The literal secrets themselves, for whoever must not write them."""
    former: Former = field(default_factory=Former, repr=False, compare=False)
    """Of a good config, what makes the reading of the next one quick."""

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """The diagnostics that stop the config from being applied."""
        return tuple(entry for entry in self.diagnostics if entry.severity is Severity.ERROR)

    @property
    def ok(self) -> bool:
        """Whether it can be applied."""
        return self.desired is not None

    def render(self) -> str:
        """All diagnostics as text, with source lines and carets."""
        return render_text(self.diagnostics, self.sources, self.hidden)


def load(
    sources: Sequence[SourceText],
    *,
    backends: Mapping[str, Backend],
    secrets: Secrets,
    former: Former | None = None,
    trouble: Trouble | None = None,
) -> Loaded:
    """Read one config from all its texts. Never raises for what they say: every problem is a diagnostic, all at once.

    `former` is what an earlier reading left. It makes this one quicker, and changes nothing of what comes out.
    `trouble` looks users of engines up on this machine, where that is asked for.
    """
    with _no_collections():
        return _load(sources, backends, secrets, former or Former(), trouble)


def _load(
    sources: Sequence[SourceText], backends: Mapping[str, Backend], secrets: Secrets, former: Former, trouble: Trouble | None
) -> Loaded:
    root, problems = parse_all(sources)
    if root is None:
        return Loaded(None, _sorted(problems, sources), {}, tuple(sources))
    texts = texts_of(root)
    same = former.same(texts, config_model(backends))
    decoded = decode(root, backends=backends, secrets=secrets, same=same)
    resolved = resolve(decoded, root, backends, same, former, trouble)
    diagnostics = _sorted([*problems, *decoded.problems, *resolved.found], sources)
    rest = without(root, same)  # what is known holds no secret
    seen = _shown(root, rest, same)
    spots = tuple(secret_nodes(rest))
    failed = any(entry.severity is Severity.ERROR for entry in diagnostics)
    if failed or decoded.config is None or resolved.desired is None:
        return Loaded(None, diagnostics, seen, tuple(sources), _hidden_lines(spots), _literal(spots))
    quiet = {name: text for name, text in texts.items() if name not in resolved.spoken_of}
    kept = remembered(root, resolved.basis, same, quiet, decoded.config.models, resolved.desired.models, seen)
    return Loaded(resolved.desired, diagnostics, seen, tuple(sources), _hidden_lines(spots), _literal(spots), kept)


def _shown(root: Node, rest: Node, same: Mapping[str, Known]) -> dict[str, Any]:
    seen: dict[str, Any] = shown(rest)
    put_back(seen, root, {name: each.shown for name, each in same.items()})
    return seen


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the garbage collector: the tree lives until the end, and looking through it in vain took half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sorted(found: Iterable[Diagnostic], sources: Sequence[SourceText]) -> tuple[Diagnostic, ...]:
    """In reading order and bounded, errors kept first when there are too many."""
    order = {source.name: index for index, source in enumerate(sources)}
    ranked = sorted(found, key=lambda entry: entry.severity is not Severity.ERROR)
    kept = ranked[:_MAX_DIAGNOSTICS]
    if len(ranked) > len(kept):
        kept.append(note(kept[-1].mark, f"{len(ranked) - len(kept):,} more findings are not listed"))
    return tuple(sorted(kept, key=lambda entry: (order.get(entry.mark.file, 0), entry.mark)))


def _literal(secrets: Iterable[Node]) -> frozenset[str]:
    return frozenset(str(node.value) for node in secrets if isinstance(node.value, str))


def _hidden_lines(secrets: Iterable[Node]) -> frozenset[tuple[str, int]]:
    """Lines of every literal secret, a text over several lines included."""
    spans = ((node.mark.file, range(node.mark.line, node.last_line + 1)) for node in secrets)
    return frozenset((file, line) for file, lines in spans for line in lines)
