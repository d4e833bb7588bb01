"""The stand-in's "model": slots that generate made-up tokens at a set pace, and count what they do."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from llama_bodies import Job
from llama_flags import Options
from llama_gguf import ModelFile
from llama_process import Knobs, Marks, crash, log

_POLL_S = 0.02
"""How soon a client that left is noticed; the real one takes 8 to 58 ms."""
_TEXT = "the night was calm and the sea lay still while a small boat drifted home under quiet stars"
_WORDS = _TEXT.split()


class ClientGone(Exception):
    """The client left, and the request is one that ends with it."""


class Stopping(Exception):
    """The server was told to stop while this request was being served."""


@dataclass(slots=True)
class Slot:
    """A place for one request; `job` is the last one it had."""

    number: int
    busy: bool = False
    job: Job | None = None


@dataclass(slots=True)
class Engine:
    """All state of a loaded stand-in."""

    options: Options
    knobs: Knobs
    marks: Marks
    file: ModelFile = field(default_factory=ModelFile)
    loaded: bool = False
    ready_at: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))
    stopping: bool = False
    in_flight: int = 0
    slots: list[Slot] = field(default_factory=list)
    waiting: deque[asyncio.Future[Slot]] = field(default_factory=deque)
    requests: int = 0
    tokens: int = 0
    tasks: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = [Slot(number) for number in range(self.options.slots)]

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.options.aliases[0]

    @property
    def n_ctx(self) -> int:
        return self.options.slot_context(self.file.n_ctx_train)

    @property
    def hung(self) -> bool:
        """The "healthy liar": whatever needs the main loop waits for ever, and /health goes on saying 200."""
        after = self.knobs.hang_after_ready_s
        return after is not None and self.loaded and time.monotonic() >= self.ready_at + after

    @property
    def dead(self) -> bool:
        """Its loop turns and its device computes nothing any more."""
        after = self.knobs.dead_after_ready_s
        return after is not None and self.loaded and time.monotonic() >= self.ready_at + after

    def become_ready(self) -> None:
        self.loaded = True
        self.ready_at = time.monotonic()

    async def hang(self, gone: Callable[[], bool]) -> None:
        """What every request of the main loop meets when it is stuck."""
        while not gone():
            await asyncio.sleep(_POLL_S)
        raise ClientGone

    async def occupy(self, job: Job, gone: Callable[[], bool]) -> Slot:
        """A free slot, in order of arrival. Whoever waits hears nothing; only a stream stops waiting when its client leaves."""
        free = next((slot for slot in self.slots if not slot.busy), None)
        slot = free if free is not None and not self.waiting else await self._wait_for_slot(job, gone)
        self.tasks += 1
        slot.busy, slot.job = True, job
        job.slot, job.task, job.started = slot.number, self.tasks, time.monotonic()
        log("I", f"id  {slot.number} | task {job.task} | processing task, is_child = 0", at="launch_slot_", part="slot")
        return slot

    async def _wait_for_slot(self, job: Job, gone: Callable[[], bool]) -> Slot:
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            while True:
                done, _ = await asyncio.wait([turn], timeout=_POLL_S)
                if done:
                    return turn.result()
                if gone() and (job.stream or self.stopping):
                    raise ClientGone
        finally:
            if turn in self.waiting:
                self.waiting.remove(turn)

    def vacate(self, slot: Slot) -> None:
        """Count what was done and hand the slot to the longest waiter; once stopping, nobody gets one any more."""
        if slot.job is not None:
            self._count(slot.job)
            made = f"n_tokens = {slot.job.prompt_tokens + slot.job.made}, truncated = 0"
            log("I", f"id  {slot.number} | task {slot.job.task} | stop processing: {made}", at="release", part="slot")
        if self.waiting and not self.stopping:
            self.waiting.popleft().set_result(slot)  # stays busy: it has its next owner already
        else:
            slot.busy = False

    async def tokens_of(self, job: Job, gone: Callable[[], bool]) -> AsyncIterator[str]:
        """Generate; a stream ends when its client leaves, anything else runs to its end for nobody."""
        while job.made < job.limit and not any(stop in job.text for stop in job.stops):
            await self._step(job, gone)
            token = _WORDS[job.made % len(_WORDS)]
            job.add(token if job.made == 0 else f" {token}", time.monotonic())
            self._count_token()
            yield token if job.made == 1 else f" {token}"
        if job.made < job.limit:
            job.finish = "stop"

    async def _step(self, job: Job, gone: Callable[[], bool]) -> None:
        """Wait for one token's time, looking at the client and at our own end meanwhile."""
        end = time.monotonic() + self.knobs.token_s
        while True:
            if self.hung or self.dead:
                await self.hang(gone)
            if self.stopping:
                raise Stopping
            if job.stream and gone():
                raise ClientGone
            left = end - time.monotonic()
            await asyncio.sleep(min(max(left, 0), _POLL_S))
            if left <= _POLL_S:
                return

    def _count_token(self) -> None:
        self.tokens += 1
        if self.knobs.crash_after_tokens and self.tokens >= self.knobs.crash_after_tokens:
            log("E", "CUDA error: an illegal memory access was encountered")
            crash("-6")

    def _count(self, job: Job) -> None:
        took = {
            "prompt_seconds_total": job.first_token - job.started,
            "tokens_predicted_seconds_total": job.last_token - job.first_token,
        }
        found = {"prompt_tokens_total": job.prompt_tokens, "tokens_predicted_total": job.made, "n_decode_total": job.made + 1}
        for name, value in {**found, **took}.items():
            self.counters[name] = self.counters.get(name, 0) + max(0, value)
        longest = self.counters.get("n_tokens_max", 0)
        self.counters["n_tokens_max"] = max(longest, job.prompt_tokens + job.made)

    def metrics(self) -> dict[str, float]:
        busy = sum(slot.busy for slot in self.slots)
        return {
            **self.counters,
            "requests_processing": busy,
            "requests_deferred": len(self.waiting),
            "n_busy_slots_per_decode": busy,
        }
