"""A changed config: what it touches, what it leaves alone, and what a bad one does, which is nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.integration.daemon import Daemon, alive, launch, model, replace_file, running, supervised

SLOW = {"STANDIN_TOKEN_S": 0.02}


def applied(daemon: Daemon, after: int) -> int:
    """The generation, once it is higher than `after`."""

    def newer() -> int | None:
        generation = daemon.get("/health")["generation"]
        return generation if generation > after else None

    return int(until(newer, "the config is taken up"))


# --- what a good one does -------------------------------------------------------------------------------------------------------


def test_sighup_adds_and_removes_without_touching_the_rest(tmp_path: Path) -> None:
    one = model(env=SLOW)
    with running(tmp_path, {"a": one}) as daemon:
        pid = daemon.pid("a")
        with daemon.stream("a", 120) as stream:
            stream.skip(2)
            daemon.write({"a": one, "b": model()})
            daemon.hup()
            until(lambda: daemon.names() == ["a", "b"], "b is on the list")
            other = daemon.pid("b")
            assert "applied (SIGHUP): 2 models" in daemon.log
            daemon.write({"a": one})
            daemon.hup()
            until(lambda: daemon.names() == ["a"], "b is gone from the list")
            until(lambda: not alive(other), "b has ended")
            assert list(stream)[-1] == "[DONE]"
        assert daemon.pids("a") == [pid]
        assert daemon.launches("a") == 1
        assert daemon.chat("b").status == 404


def test_a_removed_model_drains_first(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(parallel=1, env=SLOW)}) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 60) as stream:
            stream.skip(2)
            waiting = daemon.chat_soon()
            until(lambda: daemon.look()["waiting"] == 1, "it waits")
            daemon.apply({})
            assert waiting.result().status == 404
            assert daemon.chat().status == 404
            assert alive(pid)
            assert list(stream)[-1] == "[DONE]"
        until(lambda: not alive(pid), "it ends")


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(drain_timeout="300ms", env=SLOW)}) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 5000) as stream:
            stream.skip(2)
            start = time.monotonic()
            daemon.apply({})
            error = list(stream)[-1]["error"]
            assert 0.3 <= time.monotonic() - start < 2
            assert "drain deadline" in error["message"]
        until(lambda: not alive(pid), "it ends")


def test_fields_that_do_not_reach_the_engine_keep_the_process(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(), "b": model()}) as daemon:
        pid = daemon.pid()
        changed = model(
            aliases=["other"],
            idle_timeout="3s",
            priority=80,
            run="on-demand",
            queue={"max_wait": "9s"},
            start_timeout="5m",
            pinned=True,
        )
        daemon.apply({"a": changed, "b": model()})
        assert daemon.chat("other").status == 200
        assert daemon.look("other")["run"] == "on-demand"
        assert daemon.pids() == [pid]
        assert daemon.launches() == 1


def test_another_context_replaces_the_instance_which_serves_until_then(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW)}) as daemon:
        old = daemon.pid()
        with daemon.stream("a", 100) as stream:
            stream.skip(2)
            daemon.apply({"a": model(context=4096, env={**SLOW, "STANDIN_LOAD_S": 0.5})})
            until(lambda: len(daemon.pids()) == 2, "the new one starts beside the old")
            assert daemon.chat("a", 1).headers["X-Offloadd-Instance"] == "a-1"
            until(lambda: daemon.chat("a", 1).headers["X-Offloadd-Instance"] == "a-2", "the new one takes over")
            assert list(stream)[-1] == "[DONE]"
        until(lambda: not alive(old), "the old one ends")
        assert daemon.look()["state"] == "ready"
        assert until(lambda: daemon.look()["last_exit"], "its end is on record")["expected"]


def test_without_room_for_both_the_old_one_goes_first(tmp_path: Path) -> None:
    budget = {"host": {"limit": "100MiB"}}
    with running(tmp_path, {"a": model(env=SLOW)}, budget=budget) as daemon:
        old = daemon.pid()
        with daemon.stream("a", 30) as stream:
            stream.skip(2)
            daemon.apply({"a": model(context=4096)})
            until(lambda: daemon.look()["instances"][0]["state"] == "draining", "it drains")
            asked = daemon.chat_soon()
            assert list(stream)[-1] == "[DONE]"
        reply = asked.result()
        assert (reply.status, reply.headers["X-Offloadd-Instance"]) == (200, "a-2")
        assert not alive(old)


def test_a_reload_during_a_load(tmp_path: Path) -> None:
    one = model(env={"STANDIN_LOAD_S": 0.7})
    with running(tmp_path, {"a": one}) as daemon:
        (pid,) = until(daemon.pids, "it starts")
        daemon.apply({"a": one, "b": model()})
        assert daemon.pid("a") == pid
        assert daemon.pid("b")


def test_a_model_replaced_while_it_loads(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env={"STANDIN_LOAD_S": 600})}) as daemon:
        asked = daemon.chat_soon()
        (old,) = until(daemon.pids, "it starts")
        daemon.apply({"a": model()})
        assert asked.result().status == 200
        until(lambda: not alive(old), "the first is stopped")


def test_a_model_that_comes_back_at_once(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW)}) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 50) as stream:
            stream.skip(2)
            daemon.apply({})
            until(lambda: daemon.get("/backends/llamacpp")["instances"][0]["state"] == "draining", "it drains")
            daemon.apply({"a": model(env=SLOW)})
            assert daemon.chat().status == 200
            assert list(stream)[-1] == "[DONE]"
        until(lambda: not alive(pid), "the drained one ends")
        daemon.pid()


# --- what a bad one does --------------------------------------------------------------------------------------------------------


def test_a_bad_config_changes_nothing_and_is_shown(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model()}) as daemon:
        pid = daemon.pid()
        generation = daemon.get("/health")["generation"]
        daemon.write({"a": model(contxt=1), "b": model(run="sometimes")})
        reply = daemon.post("/reload", None)
        assert reply.status == 400
        attempt = reply.json()["last_attempt"]
        assert not attempt["ok"]
        errors = [d for d in attempt["diagnostics"] if d["severity"] == "error"]
        assert len(errors) == 2
        assert all(d["line"] and d["column"] and d["file"].endswith("offloadd.json") for d in errors)
        assert "contxt" in attempt["message"]
        health = daemon.get("/health")
        assert health["status"] == "degraded"
        assert health["generation"] == generation
        assert health["config"]["last_attempt"] == attempt
        assert any("the last config was refused" in problem["what"] for problem in health["problems"])
        assert daemon.pids() == [pid]
        assert daemon.chat().status == 200
        daemon.apply({"a": model()})
        assert daemon.get("/health")["status"] == "ok"
        assert daemon.pids() == [pid]


def unlink(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_text("")


def half(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def unreadable(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def forbidden(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(tmp_path_factory.mktemp("shared"), {"a": model()}) as daemon:
        daemon.pid()
        yield daemon


@pytest.mark.parametrize("spoil", [unlink, empty, half, unreadable, folder, dangling, forbidden])
def test_a_spoilt_file_keeps_the_old_config(shared: Daemon, spoil: Callable[[Path], None]) -> None:
    pid = shared.pid()
    spoil(shared.config_path)
    reply = shared.post("/reload", None)
    assert reply.status == 400, reply.json()
    assert shared.get("/health")["config"]["last_attempt"]["message"]
    assert shared.pids() == [pid]
    if shared.config_path.is_dir():
        shared.config_path.rmdir()
    shared.apply({"a": model()})
    assert shared.pids() == [pid]
    assert shared.get("/health")["status"] == "ok"


# --- ways of asking -------------------------------------------------------------------------------------------------------------


def test_reload_without_waiting(shared: Daemon) -> None:
    before = shared.get("/health")["generation"]
    reply = shared.post("/reload?wait=0", None)
    assert reply.status == 202
    assert applied(shared, before)


def test_a_storm_of_sighups_is_coalesced(tmp_path: Path) -> None:
    with running(tmp_path, {"a": model(env=SLOW)}) as daemon:
        pid = daemon.pid()
        with daemon.stream("a", 60) as stream:
            stream.skip(2)
            for number in range(500):
                if number == 250:
                    daemon.write({"a": model(env=SLOW), "b": model()})
                daemon.hup()
                time.sleep(0.001)
            until(lambda: daemon.names() == ["a", "b"], "the last content wins")
            daemon.wait_for("b")
            assert list(stream)[-1] == "[DONE]"
        assert daemon.log.count("applied (SIGHUP)") < 250
        assert daemon.pids("a") == [pid]


def test_many_reloads_under_streams(tmp_path: Path) -> None:
    fixed = {"a": model(parallel=8, env=SLOW)}
    with running(tmp_path, fixed) as daemon:
        pid = daemon.pid()
        streams = [daemon.threads.submit(daemon.events, "a", 100) for _ in range(8)]
        for number in range(20):
            daemon.apply({**fixed, **({"b": model(run="on-demand", priority=number)} if number % 2 else {})})
        assert all(stream.result()[-1] == "[DONE]" for stream in streams)
        assert daemon.pids("a") == [pid]


# --- the file watcher -----------------------------------------------------------------------------------------------------------

TAKEN_UP_WITHIN_S = 3


def taken_up(daemon: Daemon, names: list[str]) -> None:
    until(lambda: daemon.names() == names, f"{names} are served", TAKEN_UP_WITHIN_S)


def text_of(daemon: Daemon, *names: str) -> str:
    return json.dumps({**daemon.base, "models": {name: model(run="on-demand") for name in names}})


def test_watcher_sees_a_file_renamed_over_the_old_one_twice(tmp_path: Path) -> None:
    with running(tmp_path, {}) as daemon:
        for names in (["a"], ["a", "b"]):
            replace_file(daemon.config_path, text_of(daemon, *names))
            taken_up(daemon, names)


def test_watcher_sees_a_write_in_place_and_waits_for_its_end(tmp_path: Path) -> None:
    with running(tmp_path, {}) as daemon:
        daemon.config_path.write_text(text_of(daemon, "a"))
        taken_up(daemon, ["a"])
        text = text_of(daemon, "a", "b")
        with daemon.config_path.open("w") as file:
            for start in range(0, len(text), 50):
                file.write(text[start : start + 50])
                file.flush()
                time.sleep(0.01)
        taken_up(daemon, ["a", "b"])


def test_watcher_sees_a_bad_file_and_then_the_good_one(tmp_path: Path) -> None:
    with running(tmp_path, {}) as daemon:
        replace_file(daemon.config_path, "{")
        until(lambda: daemon.get("/health")["status"] == "degraded", "it is refused", TAKEN_UP_WITHIN_S)
        daemon.config_path.unlink()
        replace_file(daemon.config_path, text_of(daemon, "a"))
        taken_up(daemon, ["a"])
        assert daemon.get("/health")["status"] == "ok"


def test_watcher_sees_a_symlink_swapped(tmp_path: Path) -> None:
    """As `ln -sfn` does it: the old link is replaced by a new one."""
    link = tmp_path / "etc" / "offloadd.json"
    link.parent.mkdir()
    for number in (1, 2):
        (tmp_path / f"store-{number}").mkdir()
    with supervised(linked(tmp_path, link, tmp_path / "store-1" / "offloadd.json")) as daemon:
        target = tmp_path / "store-2" / "offloadd.json"
        target.write_text(text_of(daemon, "a"))
        swap(link, target)
        taken_up(daemon, ["a"])
        target.write_text(text_of(daemon, "a", "b"))
        taken_up(daemon, ["a", "b"])


def test_watcher_sees_a_link_far_up_swapped_as_nixos_does_it(tmp_path: Path) -> None:
    """`/etc/offloadd/offloadd.json` leads through `/etc/static`, which is what a new generation swaps."""
    static, etc = tmp_path / "static", tmp_path / "etc"
    etc.mkdir()
    for number in (1, 2):
        (tmp_path / f"store-{number}" / "offloadd").mkdir(parents=True)
    static.symlink_to(tmp_path / "store-1")
    (etc / "offloadd").symlink_to(static / "offloadd")
    with running(tmp_path, {}, config_path=etc / "offloadd" / "offloadd.json") as daemon:
        (tmp_path / "store-2" / "offloadd" / "offloadd.json").write_text(text_of(daemon, "a"))
        swap(static, tmp_path / "store-2")
        taken_up(daemon, ["a"])


def test_watcher_sees_a_folder_swapped_as_kubernetes_does_it(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    first, second = mount / "..2026_01", mount / "..2026_02"
    first.mkdir()
    (mount / "..data").symlink_to(first.name)
    path = mount / "offloadd.json"
    with supervised(linked(tmp_path, path, Path("..data/offloadd.json"))) as daemon:
        for names, new, old in ((["a"], second, first), (["a", "b"], first, second)):
            new.mkdir(exist_ok=True)
            (new / "offloadd.json").write_text(text_of(daemon, *names))
            swap(mount / "..data", Path(new.name))
            (old / "offloadd.json").unlink()
            old.rmdir()
            taken_up(daemon, names)


def linked(folder_: Path, link: Path, target: Path) -> Daemon:
    """A daemon whose config is a link to a file without models; the file's folder is there."""
    link.symlink_to(target)
    place = folder_ / "seed"
    place.mkdir()
    seed = launch(place, {})
    seed.process.kill()
    seed.process.wait()
    (link.parent / target).write_text(json.dumps({**seed.base, "models": {}}))
    return launch(folder_, {}, config_path=link, **seed.base)


def swap(link: Path, target: Path) -> None:
    fresh = link.with_name(f".{link.name}.tmp")
    fresh.symlink_to(target)
    fresh.rename(link)
