"""JSON pointers: read, written, followed, and used to put things in their place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offloadd.backends.pointers import MAX_STEPS, find, parse, put, written

steps = st.lists(st.text(max_size=8), max_size=MAX_STEPS).map(tuple)


@given(steps)
def test_what_is_written_is_read_back(pointer: tuple[str, ...]) -> None:
    assert parse(written(pointer)) == pointer


@given(steps.filter(bool), st.one_of(st.text(), st.integers(), st.lists(st.text())))
def test_what_is_put_somewhere_is_found_there(pointer: tuple[str, ...], value: object) -> None:
    document: dict[str, object] = {}
    put(document, pointer, value)
    assert find(document, pointer) == value


@pytest.mark.parametrize("text", ["a", "a/b", "/a~", "/a~2", "/~", "/" * (MAX_STEPS + 1)])
def test_what_is_no_pointer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pointer"):
        parse(text)


@pytest.mark.parametrize(
    ("pointer", "found"),
    [
        ("", {"a": [{"b/c": 1}], "0": 2}),
        ("/a/0/b~1c", 1),
        ("/0", 2),
        ("/a/1", None),
        ("/a/-1", None),
        ("/a/00", None),
        ("/a/b", None),
        ("/0/x", None),
        ("/x/y", None),
        ("/a/9999999999", None),
    ],
)
def test_what_stands_at_a_place(pointer: str, found: object) -> None:
    assert find({"a": [{"b/c": 1}], "0": 2}, parse(pointer)) == found


def test_lists_are_not_made_and_what_is_in_the_way_is_named() -> None:
    body = {"a": [{}], "b": 5}
    put(body, ("a", "0", "x"), 1)
    put(body, ("c", "0"), 1)
    assert body == {"a": [{"x": 1}], "b": 5, "c": {"0": 1}}
    with pytest.raises(ValueError, match="/a is a list"):
        put(body, ("a", "1", "x"), 1)
    with pytest.raises(ValueError, match="/b is no object"):
        put(body, ("b", "x"), 1)
