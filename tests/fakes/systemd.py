"""A small service manager: hears a daemon's notifications, holds sockets, keeps descriptors, and passes them on as systemd does."""

from __future__ import annotations

import array
import ctypes
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_AS_SYSTEMD = """\
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
high = [os.dup(fd) if fd < 3 + len(fds) else fd for fd in fds]
for place, fd in enumerate(high, 3):
    os.dup2(fd, place, inheritable=True)
os.closerange(3 + len(fds), 1000)
if fds:
    os.environ["LISTEN_PID"] = str(os.getpid())
if "WATCHDOG_USEC" in os.environ:
    os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(slots=True)
class Message:
    """One datagram: its assignments in order."""

    words: list[tuple[str, str]]

    def __getitem__(self, name: str) -> str:
        return dict(self.words)[name]

    def __contains__(self, name: str) -> bool:
        return name in dict(self.words)


@dataclass(slots=True)
class ServiceManager:
    """Enough of systemd for one service at a time."""

    folder: Path
    watchdog_s: float | None = None
    messages: list[Message] = field(default_factory=list)
    stored: list[tuple[str, int]] = field(default_factory=list)
    activated: list[tuple[str, socket.socket]] = field(default_factory=list)
    _heard: threading.Condition = field(default_factory=threading.Condition)
    _socket: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._socket.bind(str(self.address))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(b"", str(self.address))
        assert self._thread
        self._thread.join()
        self._socket.close()
        for _, sock in self.activated:
            sock.close()
        for _, fd in self.stored:
            os.close(fd)

    @property
    def address(self) -> Path:
        return self.folder / "notify"

    @property
    def environment(self) -> dict[str, str]:
        """What a service is told, but for the process ids that it is known by."""
        names = [name for name, _ in self._descriptors()]
        found = {"NOTIFY_SOCKET": str(self.address)}
        if self.watchdog_s:
            found["WATCHDOG_USEC"] = str(int(self.watchdog_s * 1e6))
        if names:
            found.update(LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
        return found

    def listen(self, address: Any, family: socket.AddressFamily = socket.AF_INET, name: str = "ml-offload-api.socket") -> Any:
        """Hold a listening socket for the service, as a socket unit does; its address."""
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(4096)
        self.activated.append((name, sock))
        return sock.getsockname()

    def spawn(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the service with all that it is to be given."""
        fds = [fd for _, fd in self._descriptors()]
        command = [sys.executable, "-c", _AS_SYSTEMD, ",".join(map(str, fds)), *argv]
        whole = {**os.environ, **(env or {}), **self.environment}
        with log.open("ab") as out:
            return subprocess.Popen(
                command, env=whole, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def wait_for(self, found: Callable[[Message], bool], what: str, since: int = 0, within_s: float = 30) -> int:
        """The number of the first message from `since` on that is the one."""
        with self._heard:
            where = self._heard.wait_for(
                lambda: next((n for n, message in enumerate(self.messages) if n >= since and found(message)), -1) + 1, within_s
            )
        assert where, f"{what} was not heard; heard were {[message.words for message in self.messages[since:]]}"
        return where - 1

    def wait_word(self, name: str, value: str | None = None, since: int = 0, within_s: float = 30) -> int:
        """The number of the first message with the assignment."""
        return self.wait_for(
            lambda message: name in message and value in (None, message[name]), f"{name}={value or '…'}", since, within_s
        )

    def statuses(self) -> list[str]:
        return [message["STATUS"] for message in self.messages if "STATUS" in message]

    def _descriptors(self) -> list[tuple[str, int]]:
        return [*((name, sock.fileno()) for name, sock in self.activated), *self.stored]

    def _listen(self) -> None:
        while True:
            text, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(64))
            if not text:
                return
            fds = array.array("i")
            for _, _, data in ancillary:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            with self._heard:
                message = Message([(name, value) for name, _, value in (line.partition("=") for line in text.decode().split("\n"))])
                self.messages.append(message)
                self._keep(message, list(fds))
                self._heard.notify_all()

    def _keep(self, message: Message, fds: list[int]) -> None:
        if "FDSTOREREMOVE" in message:
            for name, fd in [pair for pair in self.stored if pair[0] == message["FDNAME"]]:
                self.stored.remove((name, fd))
                os.close(fd)
        for fd in fds:
            if "FDSTORE" in message and not any(_same(fd, kept) for _, kept in self.stored):
                self.stored.append((message["FDNAME"], fd))
            else:
                os.close(fd)


def _same(one: int, other: int) -> bool:
    """Whether two descriptors are one open file, asked of the kernel as systemd does: pidfds and pipes' ends share an inode."""
    number = {"x86_64": 312, "aarch64": 272}[platform.machine()]
    return ctypes.CDLL(None).syscall(number, os.getpid(), os.getpid(), 0, one, other) == 0
