"""The addresses that the API listens on, and the names that it therefore answers to."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from offloadd.errors import PermanentError
from offloadd.events import EventKind, about

UNIX = "unix:"

log = logging.getLogger(__name__)


async def listen(runner: web.AppRunner, address: str) -> None:
    """Listen on `host:port` or `unix:/path`; PermanentError says why that cannot be done."""
    if address.startswith(UNIX):
        await _listen_on_file(runner, Path(address.removeprefix(UNIX)))
        return
    host, port = split_address(address)
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
    except OSError as error:
        hint = f"see who holds it with: ss -ltnp 'sport = :{port}'"
        raise PermanentError(f"cannot listen on {address}: {error.strerror}", hint=hint) from None
    log.info("listening on http://%s", address, extra=about(EventKind.LISTENING, address=address))


async def _listen_on_file(runner: web.AppRunner, path: Path) -> None:
    """For the daemon's user and group only, from the first moment: the mask is set before the socket is made."""
    mask = os.umask(0o117)
    try:
        _clear(path)
        await web.UnixSite(runner, str(path)).start()
    except OSError as error:
        hint = "create its folder, and make it writable for this user"
        raise PermanentError(f"cannot listen on {path}: {error.strerror}", hint=hint) from None
    finally:
        os.umask(mask)
    log.info("listening on %s%s", UNIX, path, extra=about(EventKind.LISTENING, address=f"{UNIX}{path}"))


def _clear(path: Path) -> None:
    """Take away a socket that a killed daemon has left; a living one holds the data folder."""
    if path.is_socket():
        path.unlink()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; the config has checked its form."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def allowed_hosts(addresses: Sequence[str], named: Sequence[str]) -> frozenset[str]:
    """Host names that requests may be addressed to, loopback aside."""
    tcp = [address for address in addresses if not address.startswith(UNIX)]
    return frozenset({split_address(address)[0].lower() for address in tcp} | {name.lower() for name in named})
