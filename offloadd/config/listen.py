"""Addresses that the API can listen on."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_MAX_PATH = 107
"""Bytes of a UNIX socket's path that Linux takes."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, without brackets, and a port; port 0 lets the system choose."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. A name other than localhost may resolve to anything."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """An absolute socket path."""

    path: str


def parse_listen(text: str) -> TcpAddress | UnixAddress:
    """Read `host:port`, `[::1]:9000` or `unix:/path`; raise ValueError that says what was expected."""
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    found = _HOST_PORT.fullmatch(text)
    if found is None:
        raise ValueError('expected host:port, such as "127.0.0.1:9000" or "[::1]:9000", or unix:/path')
    if int(found["port"]) > 65535:
        raise ValueError("a port is at most 65535")
    if found["v6"]:
        return TcpAddress(_checked(found["v6"]), int(found["port"]))
    looks_numeric = found["host"].replace(".", "").isdigit()
    return TcpAddress(_checked(found["host"]) if looks_numeric else found["host"], int(found["port"]))


def _unix(path: str) -> UnixAddress:
    if not path.startswith("/") or "\0" in path:
        raise ValueError("a socket path is absolute, such as unix:/run/offloadd/api.sock")
    if len(path.encode(errors="replace")) > _MAX_PATH:
        raise ValueError(f"a socket path has at most {_MAX_PATH} bytes")
    return UnixAddress(path)


def _checked(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f'"{host}" is not an IP address') from None
    return host
