"""What is written down of one instance, for a daemon that comes after this one: its `Life`, until nothing of it is left."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from offloadd.runtime.instances import Lives
from offloadd.runtime.launchers import Launcher, Process
from offloadd.state.life import Life
from offloadd.units import Seconds

SHARED_WHILE_LOADING = Seconds(2)
SHARED_EVERY = Seconds(60)
"""How often it is looked at what a server has of the machine's shared memory: nearly all of it is made while it loads."""


class Diary:
    """The only writer of one Life."""

    def __init__(self, life: Life, lives: Lives, launcher: Launcher) -> None:
        self._life = life
        self._lives = lives
        self._launcher = launcher
        self._over = False
        self._pen = asyncio.Lock()

    @property
    def life(self) -> Life:
        """With all that is known, be it written yet or not."""
        return self._life

    def learn(self, **changes: object) -> None:
        """What is new, to be written down with the next note."""
        self._life = replace(self._life, **changes)  # type: ignore[arg-type]

    async def note(self, **changes: object) -> None:
        """Write down what is new. Whoever is cancelled meanwhile leaves the writing to end by itself, and in its turn."""
        self.learn(**changes)
        await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> None:
        async with self._pen:
            if not self._over:
                await asyncio.to_thread(self._lives.keep, self._life)

    async def cross_out(self) -> None:
        """Nothing of it is left, and nothing more is to be written of it."""
        self._over = True
        async with self._pen:
            await asyncio.to_thread(self._lives.drop, self._life.mark)

    async def keep_shared(self, process: Process) -> None:
        """Know what it has of the machine's shared memory: when it is dead, nobody can tell any more whose that was."""
        while True:
            await self.note_shared(process)
            await asyncio.sleep(SHARED_WHILE_LOADING if self._life.ready_at is None else SHARED_EVERY)

    async def note_shared(self, process: Process) -> None:
        """The same, now; written down where it is more than before."""
        pieces = await asyncio.to_thread(self._launcher.shared, process.id, self._life)
        if not set(self._life.shared).issuperset(pieces):
            await self.note(shared=pieces)
