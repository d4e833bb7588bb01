"""What is made in great numbers and stays: kept from the collector of cycles, which holds up everybody while it looks at it."""

from __future__ import annotations

import gc
import threading

OFTEN = 100
"""Models made between two times, at least."""
PART = 8
"""And of all that were ever made, at least one in so many: what is in a cycle at such a moment and dropped later is lost for good,
so there may not be ever more of these moments on a daemon whose config is read again every minute. This way there are a hundred of
them in a lifetime, and what is not kept from the collector yet is a small part of what is."""


class _Lasting:
    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting = 0
        self._ever = 0

    def made(self, count: int = 1) -> None:
        """Say that what is known of so many more models was made.

        A full collection looks at all objects that there are, for tens of milliseconds with thousands of models, in which no token
        moves; and that ever again while they are found. None of them is part of a cycle, so they go with their last holder all the
        same.
        """
        with self._turn:
            self._waiting += count
            if self._waiting < max(OFTEN, self._ever // PART):
                return
            self._ever += self._waiting
            self._waiting = 0
        gc.collect()  # what is dead by now would stay as well; there is little to look at, since what stayed before is left out
        gc.freeze()  # which takes no time: it joins a list to another


made = _Lasting().made
