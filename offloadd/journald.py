"""The journal's own protocol: one datagram of fields for each entry, in a sealed memory file where it is too large for one."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress

SOCKET = "/run/systemd/journal/socket"
_BUFFER = 8 * 2**20
_MAX_ENTRY = 4 * 2**20
"""A longer field is cut: it would be a mistake, and journald refuses some sizes anyway."""
_F_ADD_SEALS = 1033
_ALL_SEALS = 0xF
_TOO_LARGE = frozenset({errno.EMSGSIZE, errno.ENOBUFS})


class Journald:
    """A speaker to journald that never waits: what journald has no room for is counted, and told with the next entry."""

    def __init__(self, address: str = SOCKET) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.lost = 0
        """Entries that were lost since the last one that was taken."""

    def send(self, fields: Mapping[str, str]) -> bool:
        """Hand over one entry; False when it is lost."""
        lost = [("OFFLOADD_LOST", str(self.lost))] if self.lost else []
        try:
            self._send(encode([*fields.items(), *lost]))
        except OSError:
            self.lost += 1
            return False
        self.lost = 0
        return True

    def close(self) -> None:
        """Say no more."""
        self._socket.close()

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, self._address)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        memory = os.memfd_create("offloadd-journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(entry)
            fcntl.fcntl(memory, _F_ADD_SEALS, _ALL_SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))]
            self._socket.sendmsg([b""], rights, 0, self._address)
        finally:
            os.close(memory)


def attached(descriptor: int, stream: str) -> bool:
    """Whether a descriptor is the stream to the journal that JOURNAL_STREAM names, as `device:inode`."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """The fields as journald reads them: those with line ends are given with their length, so that none can pass for another."""
    parts: list[bytes] = []
    for name, text in fields:
        value = text.encode(errors="replace")[:_MAX_ENTRY]
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)
