"""Scalars of YAML 1.2 core, and places of values in both spellings."""

import pytest

from offloadd.config.nodes import find
from offloadd.config.source import SourceText
from offloadd.config.syntax import parse
from offloadd.config.yaml_syntax import parse_yaml


def value(text):
    root, problems = parse(SourceText("x", text))
    assert problems == []
    return root.value["a"].node.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (word, word)
            for word in ("on", "off", "yes", "No", "y", "1:30", "1_000", "0b11", "0o8", "2024-01-01", "tRue", "1e", "=")
        ),
        ("0777", 777),
        ("0o17", 15),
        ("0xff", 255),
        ("-12", -12),
        ("+1", 1),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("~", None),
        ("", None),
        ("Null", None),
        ("TRUE", True),
        ("false", False),
        ('"1"', "1"),
        ("'true'", "true"),
        ("!!str 1", "1"),
        ("! 1", 1),
    ],
)
def test_yaml_scalars_are_those_of_1_2(text, expected):
    found = value(f"a: {text}\n")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"), [("1", 1), ("-0.5e1", -5.0), ('"\\u00e9\\/"', "é/"), ("null", None), ('"\\ud83d\\ude00"', "😀")]
)
def test_json_scalars(text, expected):
    assert value(f'{{"a": {text}}}') == expected


@pytest.mark.parametrize("text", ['{"b": 1,\n\t"a":\n[{"c": 5}]}', "b: 1\na:\n  - c: 5\n"])
def test_places_count_from_one(text):
    root, _ = parse(SourceText("x", text))
    entry, reached = find(root, ("a", 0, "c", "beyond"))
    assert reached == ("a", 0, "c")
    assert entry.node.value == 5
    lines = text.split("\n")
    assert lines[entry.node.mark.line - 1][entry.node.mark.column - 1] == "5"
    assert lines[entry.key.line - 1][entry.key.column - 1] in '"c'


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert value("\ufeffa: 1") == 1
    assert value('\ufeff{"a": 1}') == 1


def test_a_flow_mapping_is_yaml_though_it_opens_like_json():
    assert value("{a: on}") == "on"


def test_both_parsers_of_yaml_agree(monkeypatch):
    import yaml

    source = SourceText("x", "a: &x [1, on, {b: 'c'}]\nd: *x\n")
    fast = parse_yaml(source, [])
    monkeypatch.setattr("offloadd.config.yaml_syntax._PARSER", yaml.BaseLoader)
    assert parse_yaml(source, []) == fast
