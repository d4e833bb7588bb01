"""Forms with files: the fields that decide where a request goes, found without looking into the files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message

from offloadd.errors import RequestError

_NAME = re.compile(rb'\bname="([^"]*)"|\bname=([^\s;"]+)', re.IGNORECASE)
_MAX_PARTS = 128
_MAX_HEAD = 8192


def is_form(content_type: str) -> bool:
    """Whether a body of this type is a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


class Form:
    """The short text fields of a form; RequestError 400 when it is none."""

    def __init__(self, body: bytes, content_type: str) -> None:
        self._body = body
        self._places: dict[str, tuple[int, int]] = {}
        for name, start, end in _parts(body, _boundary(content_type)):
            self._places.setdefault(name, (start, end))

    def text(self, name: str) -> str | None:
        """The field's value; None when there is none."""
        place = self._places.get(name)
        return None if place is None else self._body[place[0] : place[1]].decode(errors="replace")

    def replaced(self, name: str, value: str) -> bytes:
        """The whole body with another value for the field, and every other byte as it was."""
        start, end = self._places[name]
        return self._body[:start] + value.encode() + self._body[end:]


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["Content-Type"] = content_type
    found = message.get_param("boundary", failobj="")
    if not isinstance(found, str) or not 0 < len(found) <= 70:
        raise RequestError(400, "invalid_body", "the form's Content-Type names no boundary")
    return found.encode()


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, int, int]]:
    """Name of each part, and where its content begins and ends."""
    delimiter = b"\r\n--" + boundary
    if not body.startswith(delimiter[2:]):
        raise RequestError(400, "invalid_body", "the body is not the form that its Content-Type says it is")
    at = len(delimiter) - 2
    for _ in range(_MAX_PARTS):
        if body[at : at + 2] == b"--":
            return
        head_end = body.find(b"\r\n\r\n", at, at + _MAX_HEAD)
        end = body.find(delimiter, head_end + 2 if head_end >= 0 else at)
        if head_end < 0 or end < 0:
            raise RequestError(400, "invalid_body", "the form breaks off in the middle of a part")
        found = _NAME.search(body, at, head_end)
        if found:
            yield (found[1] or found[2] or b"").decode(errors="replace"), head_end + 4, end
        at = end + len(delimiter)
    raise RequestError(400, "invalid_body", f"the form has more than {_MAX_PARTS} parts")
