"""What a tap reads off an answer: of each dialect, in any pieces, and nothing from the model's own words."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from offloadd.proxy.taps import Tap, Tokens
from offloadd.units import Instant


class Ticking:
    """A clock that moves on by one second with every reading."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> Instant:
        self.time += 1
        return Instant(self.time)

    def wall(self) -> float:
        return 0.0


def tapped(pieces: Iterable[bytes]) -> Tap:
    tap = Tap(Ticking())
    for piece in pieces:
        tap.feed(piece)
    return tap


def sse(*events: object) -> list[bytes]:
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]


WORD = {"choices": [{"delta": {"content": "word"}}]}
TIMINGS = {"cache_n": 5, "prompt_n": 7, "predicted_n": 20, "predicted_per_second": 33.5}
USAGE = {"prompt_tokens": 12, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 4}}
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        ([WORD, {"choices": [], "usage": USAGE, "timings": TIMINGS}], Tokens(12, 4, 20, 33.5)),
        ([WORD, {"choices": [{"finish_reason": "stop"}], "timings": TIMINGS}], Tokens(12, 5, 20, 33.5)),
        ([WORD, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}], Tokens(3, None, 2, None)),
        ([WORD, {"usage": None}], Tokens()),
        ([WORD, {"choices": [{"delta": {"content": '"usage": {"prompt_tokens": 666}'}}]}], Tokens()),
        ([WORD, {"usage": {"prompt_tokens": True, "completion_tokens": -1}, "timings": []}], Tokens()),
        (
            [{"message": {"usage": {"input_tokens": 9}}}, WORD, WORD, WORD, WORD, {"usage": {"output_tokens": 8}}],
            Tokens(9, None, 8),
        ),
        (
            [WORD, {"response": {"usage": {"input_tokens": 1, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 0}}}}],
            Tokens(1, 0, 2),
        ),
    ],
)
def test_tokens(events: list[object], tokens: Tokens) -> None:
    pieces = [*sse(*events), DONE]
    assert tapped(pieces).tokens() == tokens
    assert tapped([b"".join(pieces)]).tokens() == tokens


def test_an_answer_that_is_no_stream() -> None:
    answer = {"object": "list", "usage": {"prompt_tokens": 8, "total_tokens": 8}, "data": [0.5] * 9000}
    whole = json.dumps(answer, indent=1).encode()
    assert tapped([whole]).tokens() == Tokens(prompt=8)
    assert tapped([whole[start : start + 4096] for start in range(0, len(whole), 4096)]).tokens() == Tokens(prompt=8)


def test_events_and_first_byte() -> None:
    tap = tapped([*sse(*[WORD] * 5), b": ping\n\n", DONE])
    assert (tap.began, tap.events) == (1, 7)
    assert Tap(Ticking()).began is None


def test_what_is_kept_is_bounded() -> None:
    tap = tapped([b"x" * 100_000] * 50)
    assert tap.size == 5_000_000
    assert sum(map(len, tap._tail)) + len(tap._head) < 32_768
    assert tap.tokens() == Tokens()
