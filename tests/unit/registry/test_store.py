"""The registry: what it keeps, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from offloadd.errors import PermanentError
from offloadd.registry import migrations, store
from offloadd.registry.batch import Batch
from offloadd.registry.database import Place, open_database
from offloadd.registry.migrations import STEPS
from offloadd.registry.store import Registry, day_of
from offloadd.state.found import Format, Found
from offloadd.state.history import End, Load, Usage
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Footprint, ModelFacts
from offloadd.state.shape import LayerShape, ModelShape
from offloadd.units import Bytes, Seconds

A, ENGINE = ModelName("a"), BackendName("llamacpp")


def footprint(peak: int, load: float | None = 1.5) -> Footprint:
    return Footprint(model=A, backend=ENGINE, peak=Bytes(peak), load_seconds=None if load is None else Seconds(load))


def load(at: float, model: ModelName = A) -> Load:
    return Load(model=model, backend=ENGINE, at=at, seconds=Seconds(2.5), size=Bytes(2**40))


def end(at: float, model: ModelName = A) -> End:
    return End(
        model=model,
        backend=ENGINE,
        instance=f"{model}-1",
        at=at,
        kind="crashed",
        message="exit code 1",
        expected=False,
        peak=Bytes(7),
    )


def found(name: str, path: str) -> Found:
    shape = ModelShape(architecture="llama", layers=(LayerShape(weights=Bytes(5)),), parameters=7)
    facts = ModelFacts(path=path, size=Bytes(2**41), identity="1:2:3", content="abc", shape=shape)
    return Found(
        name=ModelName(name), store="models_path", format=Format.GGUF, facts=facts, aliases=("ORG/Näme:Q4",), projector=facts
    )


@pytest.fixture
def registry(place: Place) -> Iterator[Registry]:
    with closing(Registry(place, host="here")) as opened:
        yield opened


def again(place: Place, host: str = "here") -> closing[Registry]:
    return closing(Registry(place, host=host))


def test_what_was_learned_is_there_after_a_restart(registry: Registry, place: Place) -> None:
    assert registry.footprints() == {}
    registry.learn({"one": footprint(100), "two": footprint(200, None)}, 1000.0)
    registry.close()
    with again(place) as opened:
        assert opened.footprints() == {"one": footprint(100), "two": footprint(200, None)}
        assert opened.problem == ""


def test_the_higher_peak_is_kept(registry: Registry) -> None:
    for seen_at, peak in enumerate((100, 300, 200)):
        registry.learn({"one": footprint(peak)}, seen_at)
    assert registry.footprints()["one"].peak == 300


def test_sizes_of_terabytes_are_kept(registry: Registry) -> None:
    registry.learn({"one": footprint(2**45)}, 1.0)
    assert registry.footprints()["one"].peak == 2**45


def test_a_footprint_under_a_former_key_moves(registry: Registry) -> None:
    registry.learn({"former": footprint(100), "other": footprint(5), "known": footprint(6)}, 1.0)
    assert registry.write(Batch(moved={"former": "new", "other": "known", "missing": "x"}), 2.0)
    found = registry.footprints()
    assert (found["new"].peak, found["known"].peak, "former" in found, "x" in found) == (100, 6, False, False)


def test_those_not_seen_for_longest_are_forgotten(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_FOOTPRINTS", 3)
    monkeypatch.setattr(store, "PRUNE_EVERY", 1)
    for number in range(5):
        registry.learn({f"key-{number}": footprint(number + 1)}, float(number))
    registry.learn({"key-2": footprint(1)}, 9.0)
    registry.learn({"key-5": footprint(6)}, 10.0)
    assert set(registry.footprints()) == {"key-2", "key-4", "key-5"}


def test_history_comes_back_newest_first_and_bounded(registry: Registry, place: Place) -> None:
    now = 1_800_000_000.0
    events = [now - number for number in range(store.SHOWN_EVENTS + 5)]
    assert registry.write(Batch(loads=[load(at) for at in events], ends=[end(at) for at in events]), now)
    assert registry.write(Batch(loads=[load(now, ModelName("b"))]), now)
    registry.close()
    with again(place) as opened:
        history = opened.history(A)
        assert history.loads == tuple(load(at) for at in events[: store.SHOWN_EVENTS])
        assert history.ends == tuple(end(at) for at in events[: store.SHOWN_EVENTS])
        assert len(opened.history(ModelName("b")).loads) == 1


def test_usage_adds_up_per_model_and_day_over_daemons(registry: Registry, place: Place) -> None:
    today, before = day_of(1_800_000_000.0), day_of(1_800_000_000.0 - store.DAY_S)
    one = Usage(answered=2, failed=1, prompt_tokens=10, completion_tokens=2**40, seconds=1.5)
    with again(place, "there") as other:
        for each in (registry, other):
            assert each.write(Batch(usage={(A, today): one, (A, before): Usage(cancelled=1), (ModelName("b"), today): one}), 1.8e9)
    assert registry.history(A).days == {today: one.plus(one), before: Usage(cancelled=2)}
    assert list(registry.history(A).days) == [today, before]
    assert registry.totals() == {A: one.plus(one).plus(Usage(cancelled=2)), "b": one.plus(one)}


def test_history_is_pruned_by_age_and_by_number(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PRUNE_EVERY", 1)
    now = 1_800_000_000.0
    old = Batch(
        loads=[load(now - store.EVENT_AGE_S - 1)],
        ends=[end(now - store.EVENT_AGE_S - 1), end(now - 5)],
        usage={(A, day_of(now - store.USAGE_AGE_S - store.DAY_S)): Usage(answered=1), (A, day_of(now)): Usage(answered=1)},
    )
    registry.write(old, now)
    assert registry.history(A).loads == ()
    assert [each.at for each in registry.history(A).ends] == [now - 5]
    assert list(registry.history(A).days) == [day_of(now)]
    monkeypatch.setattr(store, "KEPT_EVENTS", 3)
    registry.write(Batch(loads=[load(now - number) for number in range(9)]), now)
    assert [each.at for each in registry.history(A).loads] == [now, now - 1, now - 2]


def test_models_on_disk_come_back_whole_and_belong_to_their_host(registry: Registry, place: Place) -> None:
    here = {path: found(name, path) for name, path in (("one", "/m/one.gguf"), ("two", "/m/two.gguf"))}
    assert registry.write(Batch(found=dict(here)), 1.8e9)
    with again(place, "there") as other:
        assert other.found().present == {}
        other.write(Batch(found={"/m/one.gguf": found("theirs", "/m/one.gguf")}), 1.8e9)
    assert registry.found().present == here
    assert registry.write(Batch(found={"/m/two.gguf": None, "/m/one.gguf": found("other", "/m/one.gguf")}), 1.8e9)
    shelf = registry.found()
    assert shelf.present == {"/m/one.gguf": found("other", "/m/one.gguf")}
    assert shelf.names == {"/m/one.gguf": "other", "/m/two.gguf": "two"}


def test_a_model_that_lies_unchanged_for_years_is_not_forgotten(registry: Registry, place: Place) -> None:
    now = 1.8e9
    registry.write(Batch(found={"/m/one.gguf": found("one", "/m/one.gguf"), "/m/two.gguf": found("two", "/m/two.gguf")}), now)
    registry.write(Batch(found={"/m/two.gguf": None}), now)
    with again(place, "there") as other:
        other.write(Batch(found={"/m/one.gguf": found("theirs", "/m/one.gguf")}), now)
    for year in (1, 2):
        with again(place, "here") as later:
            later.write(Batch(loads=[load(now + year * 365 * store.DAY_S)]), now + year * 365 * store.DAY_S)
            assert later.found().present == {"/m/one.gguf": found("one", "/m/one.gguf")}
            assert "/m/two.gguf" not in later.found().names
    with again(place, "there") as other:
        assert other.found().present == {}  # of a machine that nobody has heard of since


def test_what_could_not_be_written_joins_what_came_since() -> None:
    before, later = Batch(footprints={"k": footprint(9)}), Batch(footprints={"k": footprint(5), "l": footprint(1)})
    before.count(A, "2026-11-25", Usage(answered=1))
    later.count(A, "2026-11-25", Usage(answered=2))
    before.found["/a"], later.found["/a"] = found("a", "/a"), None
    whole = before.before(later)
    assert (whole.footprints["k"].peak, whole.footprints["l"].peak) == (9, 1)
    assert whole.usage == {(A, "2026-11-25"): Usage(answered=3)}
    assert whole.found == {"/a": None}
    assert not Batch()


def test_a_newer_schema_is_refused_and_left_alone(registry: Registry, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.learn({"one": footprint(1)}, 1.0)
    registry.close()
    monkeypatch.setattr(migrations, "STEPS", STEPS[:-1])
    with pytest.raises(PermanentError, match=f"schema {len(STEPS)}, and this offloadd knows {len(STEPS) - 1}") as refused:
        Registry(place)
    assert "newer offloadd" in refused.value.hint
    monkeypatch.undo()
    with again(place) as opened:
        assert set(opened.footprints()) == {"one"}


def write_one(place: Place) -> None:
    """As the first schema had it."""
    with closing(open_database(place)) as first:
        first.execute_sql("INSERT INTO footprint VALUES ('k', 'a', 'llamacpp', 100, 1, NULL, 5.0)")


def test_every_older_schema_is_brought_up_with_what_it_holds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(migrations, "STEPS", STEPS[:1])
        write_one(place)
    with again(place) as opened:
        assert opened.footprints() == {"k": footprint(100, None)}
        assert opened.write(Batch(loads=[load(1.8e9)]), 1.8e9)
    if place.file:
        with again(Place(file=place.file.with_name("registry.db.schema-1"))) as backup:
            assert set(backup.footprints()) == {"k"}


def test_a_step_that_fails_leaves_the_schema_as_it_was(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(migrations, "STEPS", STEPS[:1])
        write_one(place)
    monkeypatch.setattr(migrations, "STEPS", (*STEPS[:1], (*STEPS[1], "CREATE NONSENSE")))
    with again(place) as opened:
        assert "cannot be used" in opened.problem
        assert "syntax error" in opened.problem
    monkeypatch.undo()
    with again(place) as opened:
        assert opened.problem == ""
        assert set(opened.footprints()) == {"k"}


def test_no_password_is_ever_shown() -> None:
    shown = str(Place(url="postgresql://me:p%40ss-word@db.lan:5432/offloadd?password=other&sslmode=require"))
    assert shown == "postgresql://me:***@db.lan:5432/offloadd?password=***&sslmode=require"
