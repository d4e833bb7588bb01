"""What the planner does and says: one example per main decision."""

from __future__ import annotations

from offloadd.state.actions import DrainInstance, StopInstance, StopReason
from offloadd.state.desired import Replicas, RunMode
from offloadd.state.observed import InstanceState
from offloadd.units import Instant, Seconds
from tests.unit.plan.build import ALPHA, BAD_FILE, BETA, NOW, Scene, ended, gib, offer, spec, unknown, view

ALWAYS = RunMode.ALWAYS


# Starting


def test_a_waiting_request_starts_its_model() -> None:
    scene = Scene(spec("qwen")).wait("qwen")
    assert scene.does() == ["start qwen-1"]
    assert scene.says("qwen") == "starting: starts as qwen-1 on alpha with 4.0 GiB: 1 request waits"


def test_a_model_that_nobody_wants_is_off() -> None:
    assert Scene(spec("qwen")).says("qwen") == "off: off: no request wants it"


def test_the_next_start_has_the_next_number() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-7", 4, InstanceState.EXITED, measured={})).had(ended("qwen-7", 1))
    assert scene.does() == ["start qwen-8", "forget qwen-7"] or scene.does() == ["forget qwen-7", "start qwen-8"]


def test_replicas_are_started_together() -> None:
    assert Scene(spec("qwen", run=ALWAYS, replicas=Replicas(min=2, max=2))).does() == ["start qwen-1", "start qwen-2"]


def test_the_second_engine_takes_over_when_the_first_cannot() -> None:
    scene = Scene(spec("qwen", run=ALWAYS, backends=(ALPHA, BETA)))
    scene.offers("qwen", offer(4, problem="llama-server is not installed"), offer(3, backend=BETA))
    assert scene.says("qwen") == "starting: starts as qwen-1 on beta with 3.0 GiB: run: always"
    assert scene.plan().decisions["qwen"].engines == {"alpha": "llama-server is not installed"}


def test_unknown_files_are_waited_for_and_not_called_a_failure() -> None:
    scene = Scene(spec("qwen")).wait("qwen").offers("qwen", unknown())
    assert scene.says("qwen") == "starting: wanted: its files are being looked at"
    assert scene.does() == []


def test_a_problem_is_said_as_it_is() -> None:
    scene = Scene(spec("qwen")).wait("qwen").offers("qwen", offer(4, problem="no such file: /models/qwen"))
    assert scene.says("qwen") == "failed: no such file: /models/qwen"


# Failing


def test_a_crash_is_retried_at_once() -> None:
    assert Scene(spec("qwen", run=ALWAYS)).had(ended("qwen-1", 0)).does() == ["start qwen-1"]


def test_a_second_crash_waits_for_the_backoff_and_wakes_for_it() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).had(ended("qwen-1", 3), ended("qwen-2", 0))
    made = scene.plan()
    decision = made.decisions["qwen"]
    assert made.actions == ()
    assert decision.state == "backoff"
    assert decision.sentence.startswith("exit code 1 before it was ready; 2 failures in a row, next start in ")
    assert made.wake_at == decision.retry_at
    assert 0.75 <= decision.retry_at - NOW <= 1.25


def test_a_damaged_file_is_not_tried_again() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).had(ended("qwen-1", 100, cause=BAD_FILE))
    assert scene.says("qwen") == "failed: its file is damaged"
    assert scene.plan().decisions["qwen"].hint == "fetch it again"


def test_a_changed_launch_is_tried_again() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).had(ended("qwen-1", 100, cause=BAD_FILE)).offers("qwen", offer(4, "other"))
    assert scene.does() == ["start qwen-1"]


def test_ten_failures_end_trying() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).had(*(ended(f"qwen-{number}", 50) for number in range(1, 11)))
    end = "given up after 10 failures in a row, until its config or file changes, or it is loaded by hand"
    assert scene.says("qwen") == f"failed: exit code 1 before it was ready; {end}"


def test_how_one_ends_is_awaited_before_the_next_start() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-1", 4, InstanceState.STOPPING))
    assert scene.says("qwen") == "stopping: starts again when qwen-1 has ended"


def test_a_late_start_is_stopped_as_its_own_fault() -> None:
    scene = Scene(spec("qwen", run=ALWAYS, start_timeout=Seconds(60))).has(view("qwen-1", 4, InstanceState.LOADING))
    (stop,) = scene.plan().actions
    assert isinstance(stop, StopInstance)
    assert (stop.reason, stop.why) == (StopReason.START_TIMEOUT, "not ready 1 min after its start (start_timeout)")


def test_a_silent_idle_instance_is_hung_after_half_a_minute() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-1", 4, last_sign=Instant(NOW - 30)))
    (stop,) = scene.plan().actions
    assert isinstance(stop, StopInstance)
    assert (stop.reason, stop.why) == (StopReason.HUNG, "no sign of life for 30 s while idle")


def test_a_silent_busy_instance_is_given_five_minutes() -> None:
    one = view("qwen-1", 4, since=Instant(0), last_sign=Instant(NOW - 299))
    assert Scene(spec("qwen", run=ALWAYS)).has(one, leases=1).plan().wake_at == NOW + 1
    one = view("qwen-1", 4, since=Instant(0), last_sign=Instant(NOW - 300))
    (stop,) = Scene(spec("qwen", run=ALWAYS)).has(one, leases=1).plan().actions
    assert stop.why == "no sign of life for 5 min while 1 request runs"


def test_the_end_of_a_long_silent_prompt_does_not_make_it_hung() -> None:
    one = view("qwen-1", 4, since=Instant(0), started_at=Instant(0), last_sign=Instant(NOW - 200))
    assert Scene(spec("qwen", run=ALWAYS)).has(one, idle_for=1).does() == []
    assert Scene(spec("qwen", run=ALWAYS)).has(one, idle_for=30).does() == ["stop qwen-1"]


# Making room


def crowded(**waiter: object) -> Scene:
    """`old` holds 8 of 12.8 GiB, and `new` wants 8."""
    return Scene(spec("old"), spec("new", **waiter), size=8.0)


def test_an_idle_instance_leaves_for_a_waiter() -> None:
    scene = crowded().has(view("old-1", 8), idle_for=41).wait("new")
    assert scene.does() == ["stop old-1"]
    assert scene.says("new") == "waiting: waits: needs 8.0 GiB on host, 4.8 GiB free; making room with old-1 (idle 41 s)"
    assert scene.says("old") == "stopping: starts again when old-1 has ended"


def test_memory_being_released_is_awaited() -> None:
    scene = crowded().has(view("old-1", 8, InstanceState.STOPPING)).wait("new")
    assert scene.does() == []
    assert scene.says("new") == "waiting: waits: needs 8.0 GiB on host, 4.8 GiB free, 8.0 GiB being released"


def test_a_busy_instance_is_drained_only_after_a_fair_wait() -> None:
    scene = crowded().has(view("old-1", 8), leases=2).wait("new", ago=9)
    assert scene.does() == []
    assert scene.plan().wake_at == NOW + 1
    scene.wait("new", ago=10)
    (drain,) = scene.plan().actions
    assert isinstance(drain, DrainInstance)
    assert (drain.deadline, drain.why) == (NOW + 120, "to make room for new (1 request waits); 2 requests run")
    assert scene.says("new").endswith("making room with old-1 (2 requests run)")


def test_pinned_and_more_important_ones_stay() -> None:
    for better in ({"pinned": True}, {"priority": 60}, {"run": ALWAYS}):
        scene = Scene(spec("old", **better), spec("new"), size=8.0).has(view("old-1", 8), idle_for=41).wait("new", ago=100)
        assert scene.does() == []
        assert scene.says("new") == ("waiting: waits: needs 8.0 GiB on host, 4.8 GiB free, and nothing may be evicted for it now")


def test_a_loading_instance_is_not_evicted_and_the_room_is_held() -> None:
    scene = crowded().has(view("old-1", 8, InstanceState.LOADING), idle_for=41).wait("new", ago=20)
    scene.models |= {"tiny": spec("tiny")}
    scene.offers("tiny", offer(1)).wait("tiny", ago=5)
    assert scene.does() == []
    assert scene.says("tiny") == "waiting: waits: needs 1.0 GiB on host, 0 B free, and nothing may be evicted for it now"


def test_memory_on_its_way_back_counts_before_anyone_is_evicted() -> None:
    scene = Scene(spec("a"), spec("b"), spec("gone"), spec("new"), size=8.0)
    scene.has(view("gone-1", 4, InstanceState.STOPPING)).has(view("a-1", 4), idle_for=90).has(view("b-1", 4), idle_for=41)
    assert scene.wait("new").does() == ["stop a-1"]


def test_an_unwanted_instance_goes_before_anyone_is_evicted_for_the_same_bytes() -> None:
    scene = Scene(spec("old", idle_timeout=Seconds(60), priority=10), spec("low", priority=5), spec("new"), size=8.0)
    scene.has(view("old-1", 8), idle_for=60).has(view("low-1", 4), idle_for=1).wait("new")
    assert scene.does() == ["stop old-1"]


def test_the_first_engine_that_can_get_room_makes_it() -> None:
    scene = Scene(spec("base", pinned=True), spec("old"), spec("new", backends=(ALPHA, BETA)), size=4.0)
    scene.has(view("base-1", 4), idle_for=1).has(view("old-1", 6), idle_for=41).wait("new")
    scene.offers("new", offer(12), offer(6, backend=BETA))
    assert scene.does() == ["stop old-1"]


def test_a_second_replica_that_nobody_waits_for_evicts_nobody() -> None:
    scene = Scene(spec("a", replicas=Replicas(min=2, max=2)), spec("b"), size=6.0)
    scene.has(view("a-1", 6), idle_for=1).has(view("b-1", 6), idle_for=41)
    assert scene.does() == []


def test_what_exceeds_the_limit_fails_with_advice() -> None:
    scene = Scene(spec("qwen"), size=13.0).wait("qwen")
    assert scene.says("qwen") == "failed: needs 13.0 GiB on host, more than its limit of 12.8 GiB"
    assert scene.plan().decisions["qwen"].hint == "raise the budget, or lower context, parallel or the model's size"


def test_without_a_reading_of_memory_nothing_starts_and_nothing_stops() -> None:
    scene = crowded().has(view("old-1", 8, fingerprint="older"), idle_for=41).wait("new", ago=100)
    scene.blind = True
    assert scene.does() == []
    assert scene.says("new") == "waiting: waits: needs 8.0 GiB, and no device could be read"


# Config changes


def test_a_changed_model_starts_beside_its_old_instance() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-1", 4, fingerprint="older"))
    assert scene.does() == ["start qwen-2"]
    assert scene.says("qwen") == "ready: qwen-1 is ready on alpha with 4.0 GiB; qwen-2 starts beside it"


def test_the_old_instance_goes_when_the_new_one_is_ready() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-1", 4, fingerprint="older"), leases=1).has(view("qwen-2", 4))
    (drain,) = scene.plan().actions
    assert isinstance(drain, DrainInstance)
    assert drain.why == "its config changed; 1 request runs"


def test_the_old_instance_goes_first_where_there_is_no_room_for_both() -> None:
    scene = Scene(spec("qwen", run=ALWAYS), size=8.0).has(view("qwen-1", 8, fingerprint="older"))
    (stop,) = scene.plan().actions
    assert isinstance(stop, StopInstance)
    assert (stop.instance.number, stop.reason) == (1, StopReason.REPLACED)


def test_the_old_instance_goes_before_those_of_others() -> None:
    scene = Scene(spec("qwen", run=ALWAYS), spec("old"), size=8.0)
    scene.has(view("qwen-1", 8, fingerprint="older")).has(view("old-1", 4), idle_for=41)
    assert scene.does() == ["stop qwen-1"]


def test_the_old_instance_stays_when_the_new_one_can_get_no_room_at_all() -> None:
    scene = Scene(spec("qwen", run=ALWAYS), spec("base", pinned=True), size=8.0)
    scene.has(view("qwen-1", 2, fingerprint="older")).has(view("base-1", 6), idle_for=1)
    assert scene.does() == []


def test_while_facts_are_unknown_neither_old_nor_new_is_taken_for_surplus() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).offers("qwen", unknown())
    scene.has(view("qwen-1", 4, fingerprint="older"), leases=1).has(view("qwen-2", 4, InstanceState.LOADING))
    assert scene.does() == []


def test_a_new_instance_of_which_nothing_is_known_replaces_nobody() -> None:
    scene = Scene(spec("qwen", run=ALWAYS, backends=(BETA,))).offers("qwen", unknown(BETA))
    scene.has(view("qwen-1", 4)).has(view("qwen-2", 4, backend=BETA))
    assert scene.does() == []


def test_a_model_that_the_config_no_longer_names_is_drained() -> None:
    scene = Scene(spec("other")).has(view("qwen-1", 4), leases=1)
    (drain,) = scene.plan().actions
    assert drain.why == "the config no longer names its model; 1 request runs"


def test_fewer_replicas_keep_the_busy_one() -> None:
    scene = Scene(spec("qwen", run=ALWAYS)).has(view("qwen-1", 4)).has(view("qwen-2", 4), leases=1)
    (stop,) = scene.plan().actions
    assert (str(stop.instance), stop.why) == ("qwen-1", "1 wanted, 2 there")


# Ends


def test_a_drained_instance_is_stopped_when_its_last_request_ended() -> None:
    one = view("qwen-1", 4, InstanceState.DRAINING, drain_deadline=Instant(NOW + 50))
    assert Scene(spec("qwen")).has(one).does() == ["stop qwen-1"]
    assert Scene(spec("qwen")).has(one, leases=1).plan().wake_at == NOW + 50
    assert Scene(spec("qwen")).has(one, leases=1).says("qwen") == "draining: qwen-1 is draining; no request wants it"


def test_at_the_drain_deadline_it_is_stopped_with_what_it_holds() -> None:
    one = view("qwen-1", 4, InstanceState.DRAINING, drain_deadline=NOW)
    (stop,) = Scene(spec("qwen")).has(one, leases=2).plan().actions
    assert stop.why == "2 requests run still, at the drain deadline"


def test_an_exited_instance_is_forgotten() -> None:
    assert Scene(spec("qwen")).has(view("qwen-1", 4, InstanceState.EXITED)).does() == ["forget qwen-1"]


def test_an_idle_model_is_unloaded_at_its_timeout_and_not_before() -> None:
    scene = Scene(spec("qwen", idle_timeout=Seconds(60))).has(view("qwen-1", 4), idle_for=59)
    assert (scene.does(), scene.plan().wake_at) == ([], NOW + 1)
    scene.has(view("qwen-1", 4), idle_for=60)
    assert scene.says("qwen") == "stopping: qwen-1 is being stopped; idle for 1 min, idle_timeout is reached"


def test_a_serving_model_says_how_busy_it_is() -> None:
    scene = Scene(spec("qwen")).has(view("qwen-1", 4), leases=3)
    assert scene.says("qwen") == "ready: qwen-1 is ready on alpha with 4.0 GiB, 3 requests run"
    assert scene.plan().accounts[next(iter(scene.plan().accounts))].reserved == gib(4)
