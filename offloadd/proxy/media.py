"""Which addresses an engine may be made to fetch images, audio and video from. None, unless the config names their hosts.

An engine fetches what a request points to, from inside the network that the operator trusts. So the addresses are looked at here,
by one parser and before any engine sees them; data that comes within the request is always fine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from offloadd.errors import RequestError

_KEYS = frozenset({"image_url", "video_url", "audio_url", "file_url"})
"""Under which requests of every dialect name what is to be fetched: as text, or as an object with `url`."""
_HOLDERS = _KEYS | {"source"}
_PLAIN = re.compile(r"[\x21-\x7e]+")
_MAX_DEPTH = 64


def may_point(body: bytes) -> bool:
    """Whether a JSON body may hold an address at all: the many requests that are text alone are not read twice."""
    return b"url" in body or b"\\u00" in body  # such a key, written out or in escapes


def check_media(body: bytes, allowed: Collection[str]) -> None:
    """Refuse a JSON body that points an engine to a host that is not allowed; RequestError 400 names it."""
    if not may_point(body):
        return
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return  # no JSON, so nothing that an engine reads addresses from
    for address in _addresses(fields, "", 0):
        _check(address, allowed)


def _addresses(value: Any, holder: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise RequestError(400, "invalid_body", f"the request's body is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) and (key in _KEYS or (key == "url" and holder in _HOLDERS)):
                yield item
            elif not isinstance(item, str):
                yield from _addresses(item, key, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _addresses(item, holder, depth + 1)


def _check(address: str, allowed: Collection[str]) -> None:
    """Only an address that every parser reads alike is looked at for its host: no blanks, no backslash, no user name."""
    if address[:5].lower() == "data:":
        return
    host = _host(address)
    if host is None or host not in allowed:
        where = f'"{host}"' if host else "that address"
        message = f"engines may not fetch from {where}; send the data itself, as data:…, or add the host to server.media_hosts"
        raise RequestError(400, "media_not_allowed", message)


def _host(address: str) -> str | None:
    if _PLAIN.fullmatch(address) is None or "\\" in address:
        return None
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port  # a port that is no number is read by others as part of a name
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        return None
    return host
