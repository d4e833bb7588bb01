"""A config read after another comes out as if it had been read alone, and what did not change is not worked out again."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offloadd.backends import discover
from offloadd.config import SourceText, load
from tests.unit.config.test_load import BACKENDS, Vault

BASE = """\
backends:
  whisper: {kind: custom, command: [whisper-server, "${port}"], preference: 5}
models:
  a: {source: a.gguf, aliases: [one]}
  b: {source: b.gguf, priority: 1, pinned: true, env: {SIZE: "1"}}
  c: {source: org/name}
"""


def read(text, former=None, backends=BACKENDS, name="c.yaml", **variables):
    texts = text if isinstance(text, tuple) else (text,)
    sources = [SourceText(f"{index}-{name}", each) for index, each in enumerate(texts)]
    return load(sources, backends=backends, secrets=Vault(**variables), former=former)


def alone(loaded):
    """All that comes out."""
    return dataclasses.replace(loaded, former=read("{}").former)


def after(first, second, **variables):
    """The second as it is read after the first; it must be what it is by itself."""
    loaded = read(second, read(first, X="x").former, **variables)
    by_itself = read(second, **variables)
    assert alone(loaded) == alone(by_itself)
    assert list(loaded.shown.get("models") or ()) == list(by_itself.shown.get("models") or ())
    if loaded.desired:
        assert list(loaded.desired.models) == list(by_itself.desired.models)
    return loaded


def test_what_is_written_as_before_is_taken_as_it_was():
    first = read(BASE)
    second = read(BASE.replace("priority: 1", "priority: 2"), first.former)
    was, now = first.desired.models, second.desired.models
    assert now["a"] is was["a"]
    assert now["c"] is was["c"]
    assert now["b"] is not was["b"]
    assert now["b"].priority == 2
    assert second.former.models["a"] is first.former.models["a"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("priority: 1", "priority: 2"),
        ("pinned: true", "pinned: 1"),
        ("priority: 1", "priority: 1.0"),
        ("priority: 1", "priority: true"),
        ("priority: 1", "priority: '1'"),
        ('SIZE: "1"', "SIZE: 1"),
        ("a: {source: a.gguf, aliases: [one]}", "a: {source: a.gguf, aliases: [b]}"),
        ("c: {source: org/name}", "c: {source: org/name, aliases: [one]}"),
        ("c: {source: org/name}", "a: {source: a.gguf, aliases: [one]}"),
        ("c: {source: org/name}", "one: {source: org/name}"),
        ("pinned: true", "pinned: true, pinned: true"),
        ("preference: 5", "preference: 0"),
        ("preference: 5}", "preference: 5}\n  vllm: {preference: 0}"),
        ("preference: 5}", "preference: 5}\n  llamacpp: {preference: 8}"),
        ("preference: 5}", "preference: none}"),
        ("preference: 5}", "preference: 5}\n  tgi: {kind: custom, command: [x]}"),
        ("  whisper: {kind", "  murmur: {kind"),
        ("models:\n", "\n\nmodels:\n"),
        ("source: a.gguf", "source: a.gguf, run: always, idle_timeout: 1m"),
        ('SIZE: "1"', "HF_TOKEN: hf_secret"),
        ('SIZE: "1"', 'SIZE: "${env:X}"'),
        ('SIZE: "1"', 'SIZE: "${env:GONE}"'),
        ("models:\n", "models:\n  <<: {}\n"),
        ("models:\n", "models: []\nmodel:\n"),
        (BASE, "models: {}"),
        (BASE, "models:"),
        (BASE, "- a"),
        (BASE, "a: ["),
        ("models:\n", "discovery: {defaults: {priority: 3}}\nmodels:\n"),
    ],
)
def test_an_edit_and_its_way_back_come_out_as_if_read_alone(old, new):
    assert old in BASE
    edited = BASE.replace(old, new)
    after(BASE, edited, X="x")
    after(edited, BASE, X="x")
    after(edited, edited, X="x")
    after(edited, f"# moved\n{edited}", X="y")


def test_what_a_reference_stands_for_is_asked_again():
    text = 'models: {m: {source: m.gguf, env: {SIZE: "${env:X}"}}}'
    assert after(text, text, X="new").desired.models["m"].env == {"SIZE": "new"}


def test_the_same_entry_under_other_engines_is_another_model():
    text = "models: {m: {source: m.bin}}"
    assert after(text, f"backends: {{vllm: {{preference: 0}}}}\n{text}").desired.models["m"].backends[0] == "vllm"


def test_other_adapters_know_nothing_of_what_these_read():
    few = {name: adapter for name, adapter in discover().items() if name != "vllm"}
    text = "models: {m: {source: m.gguf, vllm: {eager: true}}}"
    former = read(text).former
    assert former.models
    assert alone(read(text, former, few)) == alone(read(text, backends=few))
    assert not read(text, former, few).ok


def test_a_bad_config_leaves_nothing_to_go_by():
    assert not read(BASE.replace("priority: 1", "priority: 1000")).former.models


def test_no_more_is_kept_than_the_last_config_holds():
    former = read(BASE).former
    assert set(read("models: {z: {source: z.gguf}}", former).former.models) == {"z"}


def test_findings_are_at_their_new_place():
    text = "models:\n  m: {source: m.gguf, run: always, idle_timeout: 1m}\n"
    (found,) = after(text, f"\n\n{text}").diagnostics
    assert found.mark.line == 4


def test_a_line_that_holds_a_secret_is_hidden_where_it_is_now():
    text = "models:\n  m: {source: m.gguf, env: {HF_TOKEN: hf_secret}}\n"
    loaded = after(text, f"\n\n{text}")
    assert loaded.hidden == {("0-c.yaml", 4)}
    assert loaded.secrets == {"hf_secret"}


def test_a_key_that_two_files_set_is_found_though_both_are_known():
    one, other = "models: {m: {source: m.gguf}}", "models: {m: {source: m.gguf}, n: {source: n.gguf}}"
    assert not after(other, (one, other)).ok


ENTRIES = st.sampled_from(
    [
        {"source": "a.gguf"},
        {"source": "a.gguf", "priority": 1},
        {"source": "a.gguf", "priority": True},
        {"source": "a.gguf", "pinned": True},
        {"source": "a.gguf", "aliases": ["a", "x"]},
        {"source": "a.gguf", "aliases": ["x"]},
        {"source": "org/a"},
        {"source": "a.gguf", "run": "always", "idle_timeout": "1m"},
        {"source": "a.gguf", "env": {"API_TOKEN": "12345678"}},
        {"source": "a.gguf", "args": ["--key", "12345678"]},
        {"source": "a.gguf", "backends": ["own"]},
        {"source": "a.gguf", "sources": {"own": "x"}},
        {"surce": "a.gguf"},
        None,
    ]
)
CONFIGS = st.fixed_dictionaries(
    {"models": st.dictionaries(st.sampled_from(["a", "b", "c", "api-key"]), ENTRIES)},
    optional={"backends": st.sampled_from([{"own": {"kind": "custom", "command": ["x"]}}, {"tgi": {"preference": 0}}, {"x": {}}])},
)


@given(st.lists(CONFIGS, min_size=2, max_size=4))
@settings(deadline=None)
def test_any_configs_one_after_another_come_out_as_if_each_were_read_alone(configs):
    former = None
    for config in configs:
        loaded = read(json.dumps(config), former)
        assert alone(loaded) == alone(read(json.dumps(config)))
        former = loaded.former if loaded.ok else former


def test_what_was_good_without_a_commit_is_found_when_one_is_asked_for():
    asked = "storage: {require_pinned: true}\n" + BASE
    loaded = after(BASE, asked)
    assert [entry.message for entry in loaded.errors] == ["c may be another tomorrow, and storage.require_pinned is set"] * 2
    assert after(asked.replace("org/name", "/a/folder"), BASE).errors == ()
