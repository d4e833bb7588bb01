"""What is made in great numbers and stays: kept from the collector of cycles, which holds up everybody while it looks at it."""

from __future__ import annotations

import gc
import threading

OFTEN = 100
"""Models made between two times. What is in a cycle and dropped at such a moment is lost for good: it may not be every moment."""


class _Lasting:
    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting = 0

    def made(self, count: int = 1) -> None:
        """Say that what is known of so many more models was made.

        A full collection looks at all objects that there are, for tens of milliseconds with thousands of models, in which no token
        moves; and that ever again while they are found. None of them is part of a cycle, so they go with their last holder all the
        same.
        """
        with self._turn:
            self._waiting += count
            if self._waiting < OFTEN:
                return
            self._waiting = 0
        gc.freeze()  # which takes no time: it joins a list to another


made = _Lasting().made
