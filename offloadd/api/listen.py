"""The addresses that the API listens on, and the names that it therefore answers to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from aiohttp import web

from offloadd.errors import PermanentError

log = logging.getLogger(__name__)


async def listen(runner: web.AppRunner, address: str) -> None:
    """Listen on `host:port`; PermanentError says why that cannot be done."""
    host, port = split_address(address)
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
    except OSError as error:
        hint = f"see who holds it with: ss -ltnp 'sport = :{port}'"
        raise PermanentError(f"cannot listen on {address}: {error.strerror}", hint=hint) from None
    log.info("listening on http://%s", address)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; the config has checked its form."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def allowed_hosts(addresses: Sequence[str], named: Sequence[str]) -> frozenset[str]:
    """Host names that requests may be addressed to, loopback aside."""
    return frozenset({split_address(address)[0].lower() for address in addresses} | {name.lower() for name in named})
