"""Events of folders. They only make a look come sooner: whoever needs to know looks now and then all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import watchfiles

STEP_MS = 250
"""How often the library looks whether an event has come. Ten times as often costs an idle daemon a third of all that it takes."""
GATHERED_MS = 400
"""Events are told of as one, at the first step without more of them or after this time."""
_ROUND_MS = 60_000
"""The library comes back to us so often when nothing happens."""


class FolderWatch:
    """Calls `happened` on the running loop after events in any of the folders themselves."""

    def __init__(self, folders: Iterable[Path], happened: Callable[[], object]) -> None:
        self.folders = frozenset(folders)
        self.problem = ""
        """Why no event comes: a folder went away in this moment, or the system has no watch left. Empty when they do."""
        self._loop = asyncio.get_running_loop()
        self._happened = happened
        self._stopped = threading.Event()
        if self.folders:
            # Setting up very many watches would hold up the loop, as would a disk that does not answer.
            threading.Thread(target=self._follow, name="watch of folders", daemon=True).start()

    def stop(self) -> None:
        """End: nothing more is called. What was set up is given back within a step."""
        self._stopped.set()

    def _follow(self) -> None:
        try:
            events = watchfiles.watch(
                *sorted(self.folders),
                watch_filter=None,
                recursive=False,
                step=STEP_MS,
                debounce=GATHERED_MS,
                rust_timeout=_ROUND_MS,
                stop_event=self._stopped,
                raise_interrupt=False,
            )
            for _ in events:  # what happened is of no interest: somebody looks at everything
                self._loop.call_soon_threadsafe(self._tell)
        except (OSError, RuntimeError) as error:  # that the loop is closed is one, which nobody sees any more
            self.problem = str(error)

    def _tell(self) -> None:
        if not self._stopped.is_set():
            self._happened()
