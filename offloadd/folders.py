"""Events of folders, from the kernel. They only make a look come sooner: whoever needs to know looks now and then all the same.

The kernel is spoken to directly: the usual library looks many times a second whether an event has come, which was a third of what
an idle daemon cost.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

GATHERED_S = 0.1
"""Events are told of so long after the first of them, as one. Nothing is read meanwhile: the kernel joins those that are alike."""
_READ = 64 * 1024
_AT_ONCE = 64
"""Reads in a row; the kernel keeps 16,384 events for us at most, of at least 16 bytes each."""
# From <sys/inotify.h>. Not each write to a file (IN_MODIFY), of which a log or a download has very many, but its end.
_ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 4, 8, 64, 128, 256, 512, 1024, 2048
_ONLYDIR = 0x01000000
_MASK = _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR


class FolderWatch:
    """Calls `happened` on the running loop after events in any of the folders themselves."""

    def __init__(self, folders: Iterable[Path], happened: Callable[[], object]) -> None:
        self.folders = frozenset(folders)
        self.problem = ""
        """Why no event comes: a folder went away in this moment, or the system has no watch left. Empty when they do."""
        self._loop = asyncio.get_running_loop()
        self._happened = happened
        self._handle = -1
        self._telling: asyncio.TimerHandle | None = None
        self._stopped = False
        if self.folders:
            # Setting up very many watches would hold up the loop, as would a disk that does not answer.
            threading.Thread(target=self._set_up, name="watch of folders", daemon=True).start()

    def stop(self) -> None:
        """End: nothing more is called."""
        self._stopped = True
        if self._telling is not None:
            self._telling.cancel()
        if self._handle >= 0:
            self._loop.remove_reader(self._handle)
            os.close(self._handle)
            self._handle = -1

    def _set_up(self) -> None:
        try:
            handle = open_watches(self.folders)
        except OSError as error:
            self.problem = str(error)
            return
        try:
            self._loop.call_soon_threadsafe(self._attach, handle)
        except RuntimeError:
            os.close(handle)  # the loop is closed: nobody wants to know any more

    def _attach(self, handle: int) -> None:
        if self._stopped:
            os.close(handle)
            return
        self._handle = handle
        self._loop.add_reader(handle, self._gather)

    def _gather(self) -> None:
        self._loop.remove_reader(self._handle)
        self._telling = self._loop.call_later(GATHERED_S, self._tell)

    def _tell(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(_AT_ONCE):
                os.read(self._handle, _READ)  # what happened is of no interest: somebody looks at everything
        self._loop.add_reader(self._handle, self._gather)
        self._happened()


def open_watches(folders: Iterable[Path]) -> int:
    """A descriptor that becomes readable after an event in any of the folders. Blocks; OSError when one cannot be watched."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if handle < 0:
        raise _failed("no more watches are to be had")
    for folder in sorted(folders):
        if libc.inotify_add_watch(handle, os.fsencode(folder), ctypes.c_uint32(_MASK)) < 0:
            failure = _failed(f"{folder} cannot be watched")
            os.close(handle)
            raise failure
    return handle


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
