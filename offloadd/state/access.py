"""Who may call, and what each may do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase


class Scope(StrEnum):
    """What a call needs. `admin` opens everything; the others open what they name."""

    OPEN = "open"
    """Nothing: for whoever reaches the address."""
    READ = "read"
    INFERENCE = "inference"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What one key may use; None is no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and completion together, as engines count them; known only when an answer has ended."""
    parallel: int | None = None
    """Requests at once, those that wait included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key. Only a digest of the secret is kept."""

    name: str
    digest: bytes
    """SHA-256 of the secret: a fast hash is right for a random key."""
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    models: tuple[str, ...] = ("*",)
    limits: KeyLimits = field(default_factory=KeyLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules of the API's door."""

    keys: tuple[ApiKey, ...] = ()
    """None: whoever reaches the address may do everything."""
    media_hosts: tuple[str, ...] = ()
    """Hosts from which engines may fetch what requests point to."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may call from a browser, as `https://host:port`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who makes a request."""

    name: str = ""
    """The key's name; empty without keys, and of the daemon's own user on a UNIX socket."""
    scopes: frozenset[Scope] = frozenset({Scope.ADMIN})
    models: tuple[str, ...] = ("*",)
    limits: KeyLimits = field(default_factory=KeyLimits)

    def may(self, scope: Scope) -> bool:
        """Whether it has the scope."""
        return scope is Scope.OPEN or scope in self.scopes or Scope.ADMIN in self.scopes

    def may_use(self, model: str, aliases: Iterable[str] = ()) -> bool:
        """Whether it may use a model, by its name or one of its aliases."""
        return "*" in self.models or any(fnmatchcase(name, pattern) for name in (model, *aliases) for pattern in self.models)


ANYBODY = Caller(scopes=frozenset())
"""One that has shown no key where keys are asked for."""
EVERYTHING = Caller()
