"""What a posted config would change, as JSON: what is touched by it, and nothing that would happen anyway."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.api.preview import Change, _sources, described
from offloadd.errors import RequestError
from offloadd.plan.foresee import foresee
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState, ModelSpec, RunMode
from offloadd.state.ids import HOST_RAM
from offloadd.state.observed import ObservedState
from tests.unit.plan.build import NOW, gib, offer, ram, spec, view

ALWAYS = RunMode.ALWAYS


def observed(*specs: ModelSpec, size: float) -> ObservedState:
    running = view("a-1", size)
    return ObservedState(
        instances={running.id: running},
        devices={HOST_RAM: ram(16 - size)},
        candidates={one.name: (offer(size, fingerprint=" ".join(one.args) or "now"),) for one in specs},
        launches={running.model: 1},
    )


def change(old: tuple[ModelSpec, ...], new: tuple[ModelSpec, ...], size: float = 4.0) -> dict[str, object]:
    states = [DesiredState(models={one.name: one for one in specs}) for specs in (old, new)]
    without, within = (
        foresee(state, observed(*specs, size=size), Demand(), now=NOW) for state, specs in zip(states, (old, new), strict=True)
    )
    return described(Change(old=states[0], new=states[1], without=without, within=within, labels={HOST_RAM: "host"}))


def effects(answer: dict[str, object]) -> dict[str, tuple[str, str]]:
    return {each["model"]: (each["edit"], each["effect"]) for each in answer["models"]}  # type: ignore[attr-defined]


def test_nothing_changes_when_nothing_is_edited_even_if_something_is_about_to_happen() -> None:
    both = (spec("a", run=ALWAYS), spec("b", run=ALWAYS))  # b is about to start, with either config
    assert change(both, both)["changed"] is False


def test_each_kind_of_edit_has_its_effect() -> None:
    old = (spec("a", run=ALWAYS), spec("b"))
    assert effects(change(old, (replace(old[0], args=("--new",)), old[1]))) == {"a": ("changed", "replace")}
    assert effects(change(old, (replace(old[0], priority=60), old[1]))) == {"a": ("changed", "in place")}
    assert effects(change(old, (old[1],))) == {"a": ("removed", "stop")}
    assert effects(change(old, (*old, spec("c", run=ALWAYS)))) == {"c": ("added", "start")}
    assert effects(change(old, (*old, spec("c")))) == {"c": ("added", "none")}


def test_one_who_makes_room_is_named_though_it_was_not_edited() -> None:
    old = (spec("a"),)
    answer = change(old, (*old, spec("c", run=ALWAYS, priority=90)), size=9.0)
    assert effects(answer) == {"a": ("none", "evict"), "c": ("added", "start")}
    (host,) = answer["devices"]  # type: ignore[misc]
    assert (host["before"]["reserved_bytes"], host["after"]["reserved_bytes"]) == (gib(9), gib(9))


def test_other_sections_are_named() -> None:
    old = DesiredState(models={})
    seen = foresee(old, ObservedState(), Demand(), now=NOW)
    new = replace(old, storage=replace(old.storage, models_path=("/elsewhere",)))
    answer = described(Change(old=old, new=new, without=seen, within=seen, labels={}))
    assert (answer["changed"], answer["sections"]) == (True, ["storage"])


def test_a_body_is_a_text_or_several_files() -> None:
    assert [(s.name, s.text) for s in _sources(b"models: {}")] == [("posted config", "models: {}")]
    assert [(s.name, s.text) for s in _sources(b'{"models": {}}')] == [("posted config", '{"models": {}}')]
    assert [(s.name, s.text) for s in _sources(b'{"sources": [{"name": "a.yaml", "text": "x"}]}')] == [("a.yaml", "x")]
    for bad in (b"\xff\xfe", b'{"sources": []}'):
        with pytest.raises(RequestError):
            _sources(bad)
