"""Sizes, shares and spans: what is read, what is refused, how they print."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.units import Bytes, Share, format_bytes, format_seconds, gist, parse_bytes, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0B", 0), ("17B", 17), ("512MiB", 2**29), (" 6 GiB ", 6 * 2**30), ("1.5KiB", 1536), ("2GB", 2 * 10**9), ("1kB", 1000)],
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "512", "GiB", "-1GiB", "1e3MiB", "1 Gib", "1GiB2", "99999999TiB", "1" * 50 + "B", "٣MiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"size|more than any machine"):
        parse_bytes(text)


def test_a_near_unit_is_suggested():
    with pytest.raises(ValueError, match="did you mean GiB"):
        parse_bytes("6gib")


@pytest.mark.parametrize(("text", "expected"), [("20%", Share(20)), ("99.5 %", Share(99.5)), ("0%", Share(0)), ("1KiB", 1024)])
def test_shares_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["101%", "%", "-1%", "1%%"])
def test_other_shares_are_refused(text):
    with pytest.raises(ValueError, match="share"):
        parse_size(text)


def test_a_share_of_a_whole_is_rounded_down():
    assert Share(33).of(Bytes(10)) == 3
    assert str(Share(99.5)) == "99.5%"


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("10m", 600), ("1h", 3600), ("500ms", 0.5), ("1.5d", 129600)])
def test_spans_are_read(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "10", "s", "-5s", "1w", "10 minutes", "9999999d"])
def test_other_spans_are_refused(text):
    with pytest.raises(ValueError, match=r"time|ten years"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (17, "17 B"), (2**10, "1 KiB"), (2**29, "512 MiB"), (int(9.1 * 2**30), "9.1 GiB"), (-(2**30), "-1.0 GiB")],
)
def test_sizes_print_as_people_say_them(value, expected):
    assert format_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, "250 ms"),
        (1, "1 s"),
        (1.5, "1.5 s"),
        (41, "41 s"),
        (185, "3 min 5 s"),
        (180, "3 min"),
        (7800, "2 h 10 min"),
        (90000, "1 d 1 h"),
        (-41, "-41 s"),
    ],
)
def test_spans_print_as_people_say_them(value, expected):
    assert format_seconds(value) == expected


@given(st.text(max_size=45))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_bytes, parse_size, parse_seconds):
        with contextlib.suppress(ValueError):
            parse(text)


@given(st.integers(0, 2**59))
def test_plain_bytes_are_read_as_they_are(value):
    assert abs(parse_bytes(f"{value}B") - value) <= value * 1e-15


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("next start in 41 s", "next start in 1 min 3 s"),
        ("needs 9.1 GiB, 6.0 GiB free", "needs 512 MiB, 0 B free"),
        ("3 slots busy", "12 slots busy"),
    ],
)
def test_texts_that_differ_in_figures_alone_have_one_gist(one: str, other: str) -> None:
    assert gist(one) == gist(other)
    assert gist(one) != gist(f"not {one}")


@pytest.mark.parametrize("parse", [parse_bytes, parse_size, parse_seconds])
def test_blanks_without_end_are_refused_at_once(parse):
    began = time.process_time()
    with pytest.raises(ValueError, match="expected"):
        parse("5" + " " * 10**6 + "!")
    assert time.process_time() - began < 1
