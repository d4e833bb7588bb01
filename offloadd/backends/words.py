"""Words that a config's commands may leave to be filled in when a server is started."""

from __future__ import annotations

from collections.abc import Iterable

from offloadd.state.desired import ModelSpec
from offloadd.state.launch import Endpoint, ModelFacts


def fill(words: Iterable[str], spec: ModelSpec, facts: ModelFacts, endpoint: Endpoint) -> tuple[str, ...]:
    """`${port}`, `${source}` and `${model}`, wherever they stand in a word."""
    values = (("${port}", str(endpoint.port)), ("${source}", facts.path), ("${model}", spec.name))
    return tuple(_filled(word, values) for word in words)


def mentions(words: Iterable[str], name: str) -> bool:
    """Whether any of them asks for this value."""
    return any(f"${{{name}}}" in word for word in words)


def _filled(word: str, values: Iterable[tuple[str, str]]) -> str:
    for name, value in values:
        word = word.replace(name, value)
    return word
