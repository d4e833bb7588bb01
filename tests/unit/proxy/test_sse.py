"""Events are the same however the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.proxy.dialects import sse

PAYLOADS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(-9, 9) | st.none(), max_size=3), max_size=8
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data, cut at these places."""
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def read(chunks: list[bytes]) -> list[bytes]:
    reader = sse.EventReader()
    return [payload for chunk in chunks for payload in reader.feed(chunk)]


@given(payloads=PAYLOADS, cuts=st.lists(st.integers(0, 10_000), max_size=20), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_any_split_gives_the_same_events(payloads: list[object], cuts: list[int], ends: bytes) -> None:
    data = b"".join(sse.event(payload) for payload in payloads) + sse.DONE
    data = data.replace(b"\n", ends)
    assert [sse.decode(payload) for payload in read(pieces(data, cuts))] == payloads


@given(cuts=st.lists(st.integers(0, 200), max_size=10))
def test_only_data_is_read(cuts: list[int]) -> None:
    data = b': ping\n\nevent: x\nid: 7\ndata: {"a": 1}\n\n:\n\ndata:{"b":2}\r\n\r\ndata:\n\ndata: [DONE]\n\ndata: {"cut'
    assert read(pieces(data, cuts)) == [b'{"a": 1}', b'{"b":2}']


@pytest.mark.parametrize("payload", [b"[]", b"{", b"7", b"\xff", b'{"a": NaN}', b'{"a":' * 5000])
def test_an_event_that_is_no_object(payload: bytes) -> None:
    with pytest.raises(sse.BrokenStreamError):
        sse.decode(payload)


def test_an_event_without_an_end_is_not_gathered_for_ever() -> None:
    reader = sse.EventReader()
    chunk = b"data: " + b"x" * 2**20
    for _ in range(7):
        assert not list(reader.feed(chunk))
    with pytest.raises(sse.BrokenStreamError, match="more than"):
        list(reader.feed(chunk))
