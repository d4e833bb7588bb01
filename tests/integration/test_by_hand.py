"""What an operator does by hand, and replicas that follow the queue, on real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.plan.draft import FRESH
from tests.conformance.servers import until
from tests.integration.daemon import Daemon, model, running
from tests.integration.gpu import cards, gpu_model, process_holding, running_on


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    models = {
        "cold": model(run="on-demand", idle_timeout="1s", env={"STANDIN_LOAD_S": 0.3}),
        "steady": model(),
        "never": model(run="never"),
        "broken": model(restart={"backoff": "50ms", "max_backoff": "50ms", "give_up_after": 2}, env={"STANDIN_CRASH_AT_START": 1}),
        "many": model(run="on-demand", parallel=1, replicas={"min": 0, "max": 2}, env={"STANDIN_TOKEN_S": 0.05}),
    }
    with running(tmp_path_factory.mktemp("by-hand"), models) as daemon:
        yield daemon


def test_a_model_is_loaded_by_hand_and_stays(shared: Daemon) -> None:
    asked = [shared.threads.submit(shared.post, "/models/cold/load?wait=1", None) for _ in range(5)]
    answers = [each.result() for each in asked]
    assert {(answer.status, answer.json()["state"], answer.json()["done"]) for answer in answers} == {(200, "ready", True)}
    assert shared.launches("cold") == 1
    found = shared.look("cold")
    assert found["by_hand"]["asked"] == "load"
    assert "by hand" in found["reason"]
    assert shared.chat("cold").status == 200
    pid = shared.pid("cold")
    with pytest.raises(AssertionError):
        shared.wait_for("cold", "off", within_s=2.5)  # longer than its idle_timeout
    assert shared.pid("cold") == pid


def test_an_always_model_is_unloaded_by_hand_until_a_request_or_a_reload(shared: Daemon) -> None:
    shared.wait_for("steady")
    answer = shared.post("/models/steady/unload?wait=1", None)
    assert (answer.status, answer.json()["done"]) == (200, True)
    assert shared.look("steady")["instances"] == []
    assert "unloaded by hand" in shared.look("steady")["reason"]
    assert shared.chat("steady").status == 200  # as with any other model, a request loads it
    assert shared.post("/models/steady/unload?wait=1", None).status == 200
    assert shared.post("/reload", None).status == 200
    assert shared.wait_for("steady")["by_hand"] is None


def test_a_model_that_never_runs_takes_requests_when_it_was_loaded_by_hand(shared: Daemon) -> None:
    assert shared.chat("never").json()["error"]["code"] == "model_disabled"
    assert shared.post("/models/never/load?wait=1", None).status == 200
    assert shared.chat("never").status == 200
    assert shared.post("/models/never/unload", None).status == 202
    shared.wait_for("never", "off")
    assert shared.chat("never").status == 409


def test_one_that_was_given_up_is_tried_again_by_hand(shared: Daemon) -> None:
    shared.wait_for("broken", "failed")
    before = shared.launches("broken")
    answer = shared.post("/models/broken/load?wait=1&timeout=30s", None)
    assert answer.status == 503
    assert "cannot be loaded" in answer.json()["error"]["message"]
    assert shared.launches("broken") == before + 2
    assert shared.post("/models/steady/load?wait=1&timeout=soon", None).status == 400
    assert shared.post("/models/nobody/load", None).status == 404


def test_a_replica_comes_for_a_queue_that_lasts_and_serves(shared: Daemon) -> None:
    long = [shared.chat_soon("many", 150) for _ in range(2)]
    answers = [each.result() for each in long]
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["X-Offloadd-Instance"] for answer in answers} == {"many-1", "many-2"}


def test_a_card_is_read_again_before_its_memory_is_given(tmp_path: Path) -> None:
    nvml = cards(tmp_path, 1)
    models = {"large": gpu_model(16)}
    with running_on(nvml, tmp_path, models, patches={"offloadd.rounds.REFRESH": 3600.0}) as daemon:
        until(lambda: daemon.look("large")["fits"] == "now", "the card is read")
        time.sleep(FRESH + 0.5)  # the reading grows old, and nobody renews it
        with process_holding(nvml, 0, 12):
            asked = daemon.chat_soon("large")
            waits = daemon.wait_for("large", "waiting")
            assert "needs 16.0 GiB on gpu0" in waits["reason"]
        daemon.post("/reload", None)  # which looks at the machine
        assert asked.result().status == 200
