"""Our life under systemd: what it is told over NOTIFY_SOCKET, and the descriptors that it hands us and keeps for us.

Nothing here depends on systemd being there: without NOTIFY_SOCKET nobody is told, and nothing is kept.
"""

from __future__ import annotations

import array
import logging
import os
import re
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from offloadd.units import Seconds

log = logging.getLogger(__name__)

FIRST_FD = 3
"""systemd passes descriptors from here on."""
_SEND_TIMEOUT_S = 1.0
_STATUS_LENGTH = 1000
_STORED_NAME = re.compile(r"[\x21-\x39\x3b-\x7e]{1,200}")
"""What systemd takes as a descriptor's name, kept a little shorter: printable, without colons."""


@dataclass(frozen=True, slots=True)
class Received:
    """One descriptor that systemd handed us: by its socket unit, or out of its store."""

    name: str
    fd: int


@dataclass(slots=True)
class Manager:
    """The service manager that started us; the default one is nobody."""

    address: str = ""
    """Where it listens for us; empty when nobody does."""
    watchdog: Seconds | None = None
    """It takes us for hung when it hears nothing for so long."""
    received: list[Received] = field(default_factory=list)
    """Descriptors that nobody has taken yet."""

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> Manager:
        """Read and remove its variables: no child of ours may speak in our name, or take our descriptors for its own."""
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog = _watchdog(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))
        given = tuple(environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
        return cls(address if address.startswith(("/", "@")) else "", watchdog, _received(*given))

    def environment(self) -> dict[str, str]:
        """The variables that make us known to it after an exec of ourselves."""
        found = {"NOTIFY_SOCKET": self.address} if self.address else {}
        if self.watchdog is not None:
            found.update(WATCHDOG_USEC=str(int(self.watchdog * 1e6)), WATCHDOG_PID=str(os.getpid()))
        return found

    # --- telling ---

    def ready(self, status: str = "") -> bool:
        """We listen; also the end of every reload, whatever came of it."""
        return self._tell("READY=1", *_status(status))

    def reloading(self) -> bool:
        """A reload begins. Always followed by `ready`: without it `systemctl reload` waits for ever."""
        return self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def status(self, text: str) -> bool:
        """The line that `systemctl status` shows."""
        return self._tell(*_status(text))

    def alive(self) -> bool:
        """Feed the watchdog."""
        return self._tell("WATCHDOG=1")

    def stopping(self, within: Seconds, status: str = "") -> bool:
        """The end begins, and may take so long from now, whatever TimeoutStopSec= says."""
        return self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within * 1e6)}", *_status(status))

    # --- keeping ---

    def store(self, name: str, *fds: int, poll: bool = True) -> bool:
        """Have it keep descriptors under a name until we come back; one that is there already is kept once.

        It drops those that hang up, as a dead process's pidfd does, unless `poll` is off.
        """
        if not _STORED_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a stored descriptor")
        words = ("FDSTORE=1", f"FDNAME={name}", *(() if poll else ("FDPOLL=0",)))
        kept = [self._tell(*words, fds=[fd]) for fd in fds]
        return all(kept)

    def remove(self, name: str) -> bool:
        """Have it let go of all that it keeps under the name."""
        return self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def take(self, wanted: Callable[[Received], bool]) -> list[Received]:
        """Received descriptors that are the caller's from now on, to close as well."""
        taken = [one for one in self.received if wanted(one)]
        self.received = [one for one in self.received if one not in taken]
        return taken

    def discard_rest(self) -> None:
        """Close what nobody took, and have it forgotten."""
        for one in self.take(lambda _: True):
            log.info("nobody has a use for descriptor %d (%s) that systemd kept", one.fd, one.name)
            self.remove(one.name)
            os.close(one.fd)

    def _tell(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """Send one message; False when there is nobody, or it cannot be reached, which is no reason for us to fail."""
        if not self.address or not assignments:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
                speaker.settimeout(_SEND_TIMEOUT_S)
                address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
                speaker.sendmsg(["\n".join(assignments).encode()], rights, 0, address)
        except OSError as error:
            log.debug("cannot tell systemd %s: %s", assignments[0], error)
            return False
        return True


def name_of(socket_: socket.socket) -> str:
    """The address of a listening socket as the config would write it."""
    name = socket_.getsockname()
    if socket_.family == socket.AF_UNIX:
        path = name.decode() if isinstance(name, bytes) else name
        return f"unix:{path.replace(chr(0), '@')}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listens(fd: int) -> bool:
    """Whether a descriptor is a stream socket that listens."""
    with suppress(OSError), socket.socket(fileno=os.dup(fd)) as found:
        return found.type == socket.SOCK_STREAM and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _status(text: str) -> tuple[str, ...]:
    """One line; an empty one says nothing and leaves the last one there."""
    line = " ".join(text.split())
    return (f"STATUS={line if len(line) <= _STATUS_LENGTH else line[: _STATUS_LENGTH - 1] + '…'}",) if line else ()


def _watchdog(microseconds: str, pid: str) -> Seconds | None:
    if (pid and pid != str(os.getpid())) or not microseconds.isdecimal() or not int(microseconds):
        return None
    return Seconds(int(microseconds) / 1e6)


def _received(pid: str, count: str, names: str) -> list[Received]:
    """The descriptors that are meant for us, closed to our children."""
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    given = names.split(":") if names else []
    found = []
    for index in range(int(count)):
        with suppress(OSError):
            os.set_inheritable(FIRST_FD + index, False)
            found.append(Received(given[index] if index < len(given) else "unknown", FIRST_FD + index))
    return found
