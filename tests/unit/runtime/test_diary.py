"""What is written down of an instance is written in turn, whoever is cancelled meanwhile, and never after its end."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from offloadd.runtime.instances.diary import Diary
from offloadd.state.launch import Endpoint
from offloadd.state.life import Life, ProcessId
from offloadd.units import Instant
from tests.unit.runtime.test_instance import ACTION, Script

LIFE = Life(
    mark="a-1@1",
    instance=ACTION.instance,
    spec=ACTION.spec,
    backend=ACTION.candidate.backend,
    fingerprint="now",
    placement=ACTION.placement,
    endpoint=Endpoint(host="127.0.0.1", port=1),
    boot="boot",
    started_at=Instant(1),
)


class SlowBook(Script):
    """Writes no word before `may_go`."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = threading.Event()
        self.begun = threading.Event()
        self.pages: list[Life] = []

    def keep(self, life: Life) -> None:
        self.begun.set()
        assert self.may_go.wait(10)
        super().keep(life)
        self.pages.append(life)

    def diary(self) -> Diary:
        return Diary(LIFE, self, self)


async def test_whoever_is_cancelled_leaves_the_writing_to_end_and_the_last_word_is_written_last() -> None:
    book = SlowBook()
    diary = book.diary()
    watching = asyncio.create_task(diary.note(process=ProcessId(pid=77, started=1)))
    await asyncio.to_thread(book.begun.wait, 10)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    stopping = asyncio.create_task(diary.note(stopping="nobody wants it"))
    await asyncio.sleep(0)
    book.may_go.set()
    await stopping
    assert book.steps == ["record", "stop"]
    assert book.pages[-1].process is not None


async def test_what_waits_for_its_turn_is_not_written_after_the_end() -> None:
    book = SlowBook()
    diary = book.diary()
    notes = [asyncio.create_task(diary.note(ready_at=Instant(at))) for at in (2, 3, 4)]
    await asyncio.to_thread(book.begun.wait, 10)
    crossed_out = asyncio.create_task(diary.cross_out())
    await asyncio.sleep(0)
    book.may_go.set()
    await asyncio.gather(*notes, crossed_out)
    await diary.note(stopping="too late")
    assert book.steps == ["ready", "drop"]


async def test_what_is_only_learned_is_written_with_the_next_note() -> None:
    book = SlowBook()
    book.may_go.set()
    diary = book.diary()
    diary.learn(endpoint=replace(LIFE.endpoint, folder="/run/a"))
    assert diary.life.endpoint.folder == "/run/a"
    assert book.pages == []
    await diary.note()
    assert [page.endpoint.folder for page in book.pages] == ["/run/a"]
