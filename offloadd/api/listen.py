"""The sockets that the API listens on: those of socket units win, then those that systemd kept for us, then the config's own."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from offloadd.config.listen import TcpAddress, parse_listen
from offloadd.errors import PermanentError
from offloadd.events import EventKind, about
from offloadd.state.desired import ServerSpec
from offloadd.succession import Heirloom
from offloadd.systemd import Manager, Received, listens, name_of

UNIX = "unix:"
KEPT = "listen-"
"""How the names of listening sockets in systemd's store begin."""
BACKLOG = 1024
"""Connections that may wait to be accepted, as they do while one daemon follows another."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket, under the address that it was asked for by."""

    address: str
    socket: socket.socket
    kept: bool
    """Whether systemd holds it too: it then outlives us, and who connects meanwhile waits for the next daemon."""


@dataclass(slots=True)
class Listeners:
    """All of them, and what serves on them."""

    all: Sequence[Listener]
    activated: bool
    """Whether they come from socket units, so that the config's addresses do not matter."""
    _sites: list[tuple[Listener, web.BaseSite]] = field(default_factory=list)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens."""
        return tuple(dict.fromkeys(listener.address for listener in self.all))

    def check(self, server: ServerSpec) -> None:
        """PermanentError if a socket unit opens to a network what no key guards. The addresses of the config are checked there."""
        for one in self.all:
            parsed = None if not self.activated or one.address.startswith(UNIX) else parse_listen(one.address)
            if isinstance(parsed, TcpAddress) and not parsed.is_loopback and not server.guarded:
                message = f"the socket unit opens {one.address} to the network, and there are no keys"
                raise PermanentError(
                    message, hint="add keys under server.auth.keys, or write ListenStream=127.0.0.1:9000 in the unit"
                )

    async def serve(self, runner: web.AppRunner) -> None:
        """Begin to accept."""
        for listener in self.all:
            site = web.SockSite(runner, listener.socket, backlog=BACKLOG)
            await site.start()
            self._sites.append((listener, site))
        for address in self.addresses:
            shown = address if address.startswith(UNIX) else f"http://{address}"
            by = " (socket from systemd)" if self.activated else ""
            log.info("listening on %s%s", shown, by, extra=about(EventKind.LISTENING, address=address))

    def heirlooms(self) -> list[Heirloom]:
        """The sockets again, for a program that takes our place: they stay open when we close ours."""
        return [Heirloom("socket" if self.activated else _kept_name(one.address), os.dup(one.socket.fileno())) for one in self.all]

    async def hold_back(self, *, everywhere: bool = False) -> bool:
        """Accept no more where another holds the socket as well: who comes now waits for the next daemon. False if nowhere."""
        held = [site for listener, site in self._sites if listener.kept or everywhere]
        self._sites = [(listener, site) for listener, site in self._sites if not (listener.kept or everywhere)]
        for site in held:
            await site.stop()
        return bool(held)

    def close(self) -> None:
        """Let go of sockets that nothing serves."""
        for listener in self.all:
            listener.socket.close()


async def open_listeners(addresses: Iterable[str], manager: Manager) -> Listeners:
    """Find or make the sockets; PermanentError says why that cannot be done."""
    received = manager.take(lambda one: listens(one.fd))
    given = [one for one in received if not one.name.startswith(KEPT)]
    wanted = {} if given else {_kept_name(address): address for address in addresses}
    kept = [one for one in received if one not in given and _reachable(wanted.get(one.name))]
    _drop([one for one in received if one not in given and one not in kept], manager)
    if given:
        sockets = [socket.socket(fileno=one.fd) for one in given]
        return Listeners([Listener(name_of(sock), sock, kept=True) for sock in sockets], activated=True)
    found: list[Listener] = []
    try:
        for name, address in wanted.items():
            mine = [socket.socket(fileno=one.fd) for one in kept if one.name == name]
            sockets = mine or await _bind(address)
            stored = bool(mine and manager.address) or manager.store(name, *(sock.fileno() for sock in sockets), poll=False)
            found += [Listener(address, sock, stored) for sock in sockets]
    except PermanentError:
        Listeners(found, activated=False).close()
        raise
    return Listeners(found, activated=False)


async def _bind(address: str) -> list[socket.socket]:
    if address.startswith(UNIX):
        return [_bind_file(Path(address.removeprefix(UNIX)))]
    host, port = split_address(address)
    bound: list[socket.socket] = []
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(place)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in bound:
            sock.close()
        hint = f"see who holds it with: ss -ltnp 'sport = :{port}'" if error.errno == errno.EADDRINUSE else ""
        raise PermanentError(f"cannot listen on {address}: {error.strerror}", hint=hint) from None
    return bound


def _bind_file(path: Path) -> socket.socket:
    """For the daemon's user and group only, from the first moment: the mask is set before the socket is made."""
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o117)
    try:
        _clear(path)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = "create its folder, and make it writable for this user"
        raise PermanentError(f"cannot listen on {path}: {error.strerror}", hint=hint) from None
    finally:
        os.umask(mask)
    return sock


def _clear(path: Path) -> None:
    """Take away a socket that a killed daemon has left; a living one holds the data folder."""
    if path.is_socket():
        path.unlink()


def _reachable(address: str | None) -> bool:
    """Whether a kept socket is still wanted, and can be found by clients: a file may have been deleted."""
    return address is not None and (not address.startswith(UNIX) or Path(address.removeprefix(UNIX)).is_socket())


def _kept_name(address: str) -> str:
    return (KEPT + address.replace(":", "_"))[:200]


def _drop(kept: Iterable[Received], manager: Manager) -> None:
    """Let go of sockets that the present config has no use for."""
    for one in kept:
        with socket.socket(fileno=one.fd) as sock:
            log.info("no longer listening on %s", name_of(sock))
        manager.remove(one.name)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; the config has checked its form."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def allowed_hosts(addresses: Sequence[str], named: Sequence[str]) -> frozenset[str]:
    """Host names that requests may be addressed to, loopback aside."""
    tcp = [address for address in addresses if not address.startswith(UNIX)]
    return frozenset({split_address(address)[0].lower() for address in tcp} | {name.lower() for name in named})
