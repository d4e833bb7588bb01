"""The API's door as a config describes it: keys, and whether what is open to a network has any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from offloadd.config.decode import Decoded
from offloadd.config.diagnostics import Diagnostic, error, warning
from offloadd.config.listen import TcpAddress, parse_listen
from offloadd.config.nodes import Node, find
from offloadd.config.schema import AuthKey, Server
from offloadd.state.access import Access, ApiKey, KeyLimits, Scope

SHORT = 20
"""A key of fewer characters can be guessed."""


def access(server: Server) -> Access:
    """The rules. The secrets themselves go no further than this."""
    return Access(
        keys=tuple(_key(key) for key in server.auth.keys),
        cors_origins=server.cors_origins,
        media_hosts=tuple(host.lower() for host in server.media_hosts),
    )


def check_door(server: Server, decoded: Decoded, root: Node) -> Iterator[Diagnostic]:
    """Errors for addresses that are open to a network without a key, warnings for keys that guard little."""
    if not (decoded.is_whole(("server", "listen")) and decoded.is_whole(("server", "auth"))):
        return  # what was dropped may be the key that is missed, and places have shifted
    if not server.auth.keys and not server.insecure:
        yield from _exposed(server, root)
    for index, key in enumerate(server.auth.keys):
        if len(key.key) < SHORT:
            mark = find(root, ("server", "auth", "keys", index, "key"))[0].key
            yield warning(mark, f"a key of fewer than {SHORT} characters can be guessed", "make one with: openssl rand -hex 32")


def _exposed(server: Server, root: Node) -> Iterator[Diagnostic]:
    for index, text in enumerate(server.listen):
        address = parse_listen(text)
        if isinstance(address, TcpAddress) and not address.is_loopback:
            mark = find(root, ("server", "listen", index))[0].node.mark
            hint = "add keys under server.auth.keys; or say insecure: true, if everybody who reaches the address may do everything"
            yield error(mark, "this is not a loopback address, and there are no keys: it would be open to the whole network", hint)


def _key(key: AuthKey) -> ApiKey:
    return ApiKey(
        name=key.name,
        digest=hashlib.sha256(key.key.encode(errors="surrogatepass")).digest(),
        scopes=frozenset(Scope(scope) for scope in key.scopes),
        models=key.models,
        limits=KeyLimits(
            requests_per_minute=key.limits.requests_per_minute,
            tokens_per_minute=key.limits.tokens_per_minute,
            parallel=key.limits.parallel,
        ),
    )
