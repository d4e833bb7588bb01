"""`${env:NAME}` and `${file:/path}` in config text, and what of a config may be shown."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, Protocol

from offloadd.config.nodes import Node, Scalar

HIDDEN = "***"

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_ONLY_REFERENCES = re.compile(r"(?:\$\{(?:env|file):[^{}]*\})+")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_WORDS = frozenset(("port", "source", "model", "text"))
"""Filled in when a custom engine starts, and what was said where a conversation becomes one text."""
_SECRET_NAME = re.compile(r"(?i)(?:^|[_-])(?:key|token|secret|passw(?:or)?d)$")
_SECRET_FLAG = re.compile(r"(?i)(--?(?:[a-z0-9_-]*[_-])?(?:key|token|secret|passw(?:or)?d))(=.*)?", re.DOTALL)

_URL_SECRET = re.compile(r"(?<=://)([^/?#@\s:]*:)([^/?#\s]+)(?=@)|(?<=[?&])((?:ssl)?password=)([^&#\s]+)", re.IGNORECASE)
"""The password in a URL, as it may stand in any value."""


class Secrets(Protocol):
    """Where `${…}` looks things up."""

    def env(self, name: str) -> str | None:
        """A variable of the daemon's environment, None when it is not set."""
        ...

    def file(self, path: str) -> str:
        """A file's text; raises OSError, or ValueError when it is not text."""
        ...


def expand(text: str, secrets: Secrets) -> str:
    """Put values in the place of references; raise ValueError, whose words hold no value, at one that has none."""
    if "${" not in text:
        return text
    return _REFERENCE.sub(lambda found: _value(found, secrets), text)


@functools.lru_cache(maxsize=1024)
def is_secret_name(name: object) -> bool:
    """Whether people keep secrets under a key or variable of this name."""
    return isinstance(name, str) and _SECRET_NAME.search(name) is not None


def is_literal_secret(name: object, value: Scalar) -> bool:
    """Whether a value holds a secret itself rather than saying where it is."""
    if isinstance(value, str) and hide_in_url(value) != value:
        return True
    if value is None or isinstance(value, bool) or not is_secret_name(name):
        return False
    return _ONLY_REFERENCES.fullmatch(str(value)) is None


def hide_in_url(text: str) -> str:
    """The text with literal passwords of URLs in it replaced; references stay, since they hold nothing."""

    def hide(found: re.Match[str]) -> str:
        before, secret = (found[1], found[2]) if found[2] is not None else (found[3], found[4])
        return found[0] if _ONLY_REFERENCES.fullmatch(secret) else f"{before}{HIDDEN}"

    return _URL_SECRET.sub(hide, text) if "://" in text else text


def secret_nodes(node: Node, name: object = None) -> Iterator[Node]:
    """Every value that holds a literal secret."""
    value = node.value
    if isinstance(value, dict):
        covered = is_secret_name(name)
        for key, entry in value.items():
            yield from secret_nodes(entry.node, name if covered else key)
    elif isinstance(value, list):
        for item in value:
            yield from secret_nodes(item, name)
    elif is_literal_secret(name, value):
        yield node


def shown(node: Node, name: object = None) -> Any:
    """The config as written, `${…}` not filled in and literal secrets hidden."""
    value = node.value
    if isinstance(value, dict):
        # All below a secret name is hidden, so that a mistake in the nesting shows nothing either.
        covered = is_secret_name(name)
        return {key: shown(entry.node, name if covered else key) for key, entry in value.items()}
    if isinstance(value, list):
        items = [shown(item, name) for item in value]
        return [_shown_argument(item, items[index - 1] if index else None) for index, item in enumerate(items)]
    if isinstance(value, str) and not is_secret_name(name):
        return hide_in_url(value)
    return HIDDEN if is_literal_secret(name, value) else value


def _shown_argument(item: Any, before: Any) -> Any:
    if not isinstance(item, str):
        return item
    flag = _SECRET_FLAG.fullmatch(item)
    if flag and flag[2]:
        return f"{flag[1]}={HIDDEN}"
    previous = _SECRET_FLAG.fullmatch(before) if isinstance(before, str) else None
    follows_flag = previous is not None and not previous[2] and not item.startswith("-")
    return HIDDEN if follows_flag and not _ONLY_REFERENCES.fullmatch(item) else item


def _value(found: re.Match[str], secrets: Secrets) -> str:
    if found[0] == "$${":
        return "${"
    if found[1] is None:
        raise ValueError('"${" has no closing "}"; a text that means it literally writes "$${"')
    kind, _, name = found[1].partition(":")
    if kind == "env" and _ENV_NAME.fullmatch(name):
        return _variable(name, secrets)
    if kind == "file" and name.startswith("/"):
        return _file(name, secrets)
    if found[1] in _OWN_WORDS:
        return found[0]
    raise ValueError(f'unknown reference "{found[0][:80]}": it is ${{env:NAME}} or ${{file:/path}}; "$${{" is a literal "${{"')


def _variable(name: str, secrets: Secrets) -> str:
    value = secrets.env(name)
    if value is None:
        raise ValueError(f"the environment variable {name} is not set")
    return value


def _file(path: str, secrets: Secrets) -> str:
    try:
        text = secrets.file(path)
    except OSError as problem:
        raise ValueError(f"cannot read {path}: {problem.strerror or problem}") from None
    except ValueError:
        raise ValueError(f"{path} does not hold text") from None
    return text.removesuffix("\n").removesuffix("\r")
