"""Reads the files of a model that may be next into the page cache, in a thread, and stops as soon as the plan has no use for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from offloadd.events import EventKind, about
from offloadd.state.actions import Warm
from offloadd.units import format_bytes

log = logging.getLogger(__name__)

STEP = 2**22
"""Bytes that are read at once, after which it is seen whether to go on."""


class Warmer:
    """Reads one model's files at a time, and once for as long as the plans name it.

    `parts` gives the files of which the model at a path is made; it may raise OSError.
    """

    def __init__(self, parts: Callable[[Path], Sequence[Path]]) -> None:
        self._parts = parts
        self._known = ""
        """The identity of the files that are being read, or were."""
        self._stop = threading.Event()

    def follow(self, warm: Warm | None) -> None:
        """Do what the latest plan says. Never waits."""
        identity = warm.identity if warm is not None else ""
        if identity == self._known:
            return
        self.stop()
        self._known = identity
        if warm is not None:
            log.info("%s", warm.sentence, extra=about(EventKind.MODEL_WARMED, model=warm.model, size=warm.size, state="begun"))
            self._stop = threading.Event()
            threading.Thread(target=self._read, args=(warm, self._stop), name="warm", daemon=True).start()

    def stop(self) -> None:
        """Read no more than what is being read at this moment."""
        self._stop.set()
        self._known = ""

    def _read(self, warm: Warm, stop: threading.Event) -> None:
        _step_back()
        read = 0
        try:
            for path in warm.paths:
                for part in self._parts(Path(path)):
                    read += _read_through(part, stop)
        except OSError as error:
            said = about(EventKind.MODEL_WARMED, model=warm.model, size=read, state="failed")
            log.warning("%s: its files could not be read ahead: %s", warm.model, error, extra=said)
            return
        if not stop.is_set():
            said = about(EventKind.MODEL_WARMED, model=warm.model, size=read, state="done")
            log.info("%s: %s are in the page cache", warm.model, format_bytes(read), extra=said)


def _step_back() -> None:
    """Whoever else wants the disk or the processor goes first."""
    own = threading.get_native_id()  # of a thread of Linux both count for itself alone
    try:
        os.setpriority(os.PRIO_PROCESS, own, 19)
        psutil.Process(own).ionice(psutil.IOPRIO_CLASS_IDLE)
    except (OSError, psutil.Error):
        log.debug("the thread that reads ahead keeps its priority", exc_info=True)


def _read_through(path: Path, stop: threading.Event) -> int:
    """Read it, and let the kernel keep it; how much that was.

    To tell the kernel that it will be needed would not do: it takes such a word for as much as the disk's read-ahead only.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    room = bytearray(STEP)
    read = 0
    try:
        while not stop.is_set() and (taken := os.preadv(handle, [room], read)):
            read += taken
    finally:
        os.close(handle)
    return read
