"""The cheapest look there is: whether anything has changed since the last walk. It costs one `stat` for each folder and file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence


class Glance:
    """What `stat` said of every path of one walk, as one number each: to keep the answers would take ten times the memory.

    The number is a hash of 64 bits. Two that are alike by chance would hide one change of one file, until the next.
    """

    def __init__(self, seen: Iterable[tuple[str, int]], absent: Sequence[str]) -> None:
        pairs = list(seen)
        self._paths = [os.fsencode(path) for path, _ in pairs]  # bytes, or each call would encode its path again
        self._known = [known for _, known in pairs]
        self._absent = absent

    def is_same(self) -> bool:
        """Whether all of it is as it was, and what was not there still is not. Blocks."""
        try:
            # Not a loop of our own: nearly all of its time would be spent outside of `stat`.
            fresh = list(map(hash, map(os.stat, self._paths)))
        except OSError:
            return False
        return fresh == self._known and not any(map(os.path.exists, self._absent))
