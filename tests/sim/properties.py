"""What must hold of every plan, each as a sentence: the function's name, spelled out in its docstring.

STEP holds those that are checked on every single plan, REPLAN those that ask the planner again, and LIVENESS those about where
a run ends. A check that fails raises Broken, which names the sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from offloadd.plan.accounting import limit_of
from offloadd.plan.planner import plan
from offloadd.plan.restart import WELL, taught
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    DrainInstance,
    ForgetInstance,
    ModelState,
    Plan,
    RestInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    StopReason,
    WakeInstance,
)
from offloadd.state.desired import ModelSpec, RestartPolicy, RunMode
from offloadd.state.ids import HOST_RAM, DeviceId
from offloadd.state.launch import Candidate, ExitKind, ModelFacts
from offloadd.state.observed import LEAVING, SETTLING, TURNING, ExitRecord, InstanceState, InstanceView
from offloadd.units import Instant
from tests.sim.device_properties import DEVICE_REPLAN, DEVICE_STEP, loan_fits
from tests.sim.step import Broken, Step, take_step
from tests.sim.world import AT_FAULT, EXITS_KEPT, World

DEMANDS = ("waiting", "leases", "last_used", "idle_since", "loans", "wishes", "forgiven")
FOR_A_REASON = (StopReason.EVICTED, StopReason.IDLE, StopReason.REPLACED, StopReason.BY_HAND)

# Safety: every plan by itself


def reserved_memory_stays_within_each_devices_limit_releasing_included(step: Step) -> None:
    """A start is planned only when its promise fits beside all others, those of leaving instances included."""
    name = "reserved_memory_stays_within_each_devices_limit_releasing_included"
    for reserved in _new_promises(step):
        if not set(reserved) <= step.observed.devices.keys():
            raise Broken(name, f"{reserved} promised without a reading of memory")
    for device in step.observed.devices.values():
        new = step.new_on(device.id)
        held, limit = step.held_on(device.id), limit_of(device, step.desired.budget)
        if new and held + new > limit:
            raise Broken(name, f"{held} + {new} of {limit} on {device.id}")


def _new_promises(step: Step) -> list[Mapping[DeviceId, int]]:
    return [*(reserved for _, reserved in step.promises()), *(action.reserved for action in step.grants())]


def a_start_never_takes_memory_that_others_use_or_were_promised(step: Step) -> None:
    """On each device, what is free now covers what is new, loans too, and all that earlier promises have not taken yet."""
    for device in step.observed.devices:
        new, due, free = step.new_on(device), step.world.due(device), step.world.machine.free(device)
        if new and due + new > free and not step.unified_is_unread():
            raise Broken(
                "a_start_never_takes_memory_that_others_use_or_were_promised",
                f"{new} + {due} still due, {free} free on {device}",
            )


def an_instance_with_an_action_in_flight_gets_no_other(step: Step) -> None:
    """One action per instance and plan, and none for an instance that is being stopped."""
    name = "an_instance_with_an_action_in_flight_gets_no_other"
    keys = [action.instance for action in step.on_instances()]
    if len(set(keys)) != len(keys):
        raise Broken(name, f"two actions for one of {keys}")
    for action in step.on_instances():
        view = step.observed.instances.get(action.instance)
        if isinstance(action, StartInstance):
            if view is not None or action.instance.number <= step.observed.launches.get(action.instance.model, 0):
                raise Broken(name, f"{action.instance} is started again")
        elif view is None or view.state is InstanceState.STOPPING:
            raise Broken(name, f"{type(action).__name__} for {action.instance}, which is {view.state if view else 'unknown'}")
        elif not _in_place(action, view.state):
            raise Broken(name, f"{type(action).__name__} for {action.instance}, which is {view.state}")


def _in_place(action: Action, state: InstanceState) -> bool:
    """Whether an instance in this state can have the action at all."""
    match action:
        case ForgetInstance():
            return state is InstanceState.EXITED
        case AdoptInstance():
            return state is InstanceState.ORPHANED
        case SleepInstance():
            return state is InstanceState.READY
        case RestInstance():
            return state is InstanceState.FALLING_ASLEEP
        case WakeInstance():
            return state is InstanceState.SLEEPING
        case DrainInstance():
            return state in (InstanceState.STARTING, InstanceState.LOADING, InstanceState.READY)
        case _:
            return state is not InstanceState.EXITED


def an_instance_that_holds_leases_is_not_stopped_before_its_drain_deadline(step: Step) -> None:
    """Unless it is at fault itself."""
    for action in step.stops():
        view = step.view(action)
        if not step.leases(view.id) or action.reason in AT_FAULT:
            continue
        if view.state is not InstanceState.DRAINING or view.drain_deadline is None or step.now < view.drain_deadline:
            raise Broken(
                "an_instance_that_holds_leases_is_not_stopped_before_its_drain_deadline",
                f"{view.id} is {view.state} with {step.leases(view.id)} leases: {action.why}",
            )


def an_instance_is_found_at_fault_only_when_it_is(step: Step) -> None:
    """Late means not ready in start_timeout; hung means silent for long while idle, or for very long while busy."""
    for action in step.stops():
        process = step.world.processes[action.instance]
        if action.reason is StopReason.START_TIMEOUT:
            timeout = (step.spec(process.id.model) or process.spec).start_timeout
            begun = process.started_at if process.adopted_at is None else process.adopted_at
            if process.state is InstanceState.WAKING:
                if step.now < process.since + timeout - 1e-6:
                    raise Broken("an_instance_is_found_at_fault_only_when_it_is", f"{process.id} is not late to wake")
                continue
            fine = process.state is InstanceState.READY or (process.ready_at is not None and process.adopted_at is None)
            if fine or step.now < begun + timeout - 1e-6:
                raise Broken("an_instance_is_found_at_fault_only_when_it_is", f"{process.id} is not late")
        if action.reason is StopReason.HUNG and not process.fault:
            last = process.last_sign or process.since
            silence = step.now - (last if process.held else max(last, process.idle_since))
            if silence < (300 if process.held else 30) - 1e-6:
                raise Broken("an_instance_is_found_at_fault_only_when_it_is", f"{process.id} was silent for {silence} s only")


def what_an_earlier_daemon_left_is_adopted_or_stopped_for_a_reason(step: Step) -> None:
    """In the first plan that sees it; and it stays unless it is not wanted, is too many, or makes room for a waiter."""
    name = "what_an_earlier_daemon_left_is_adopted_or_stopped_for_a_reason"
    actions = {action.instance: action for action in step.on_instances()}
    for view in step.observed.instances.values():
        if view.state is not InstanceState.ORPHANED:
            continue
        action = actions.get(view.id)
        if isinstance(action, StopInstance):
            spec = step.spec(view.model)
            others = [one for one in step.observed.instances.values() if one.model == view.model and one.id != view.id]
            fine = (
                spec is None
                or spec.run is RunMode.NEVER
                or action.reason in FOR_A_REASON
                or view.model in step.demand.wishes
                or others
            )
            if not fine:
                raise Broken(name, f"{view.id}: {action.why}")
        elif not isinstance(action, AdoptInstance):
            raise Broken(name, f"{view.id}: {action}")


def a_pinned_instance_or_one_of_higher_priority_is_never_evicted(step: Step) -> None:
    """An eviction has a beneficiary that ranks no lower than the one that leaves."""
    name = "a_pinned_instance_or_one_of_higher_priority_is_never_evicted"
    for action in step.evictions():
        victim = step.spec(action.instance.model) or step.view(action).spec
        gainers = [spec for spec in step.desired.models.values() if f"make room for {spec.name} (" in action.why]
        if victim.pinned:
            raise Broken(name, f"{action.instance} is pinned: {action.why}")
        if "make room for a loan (" in action.why and step.loans_wait():
            continue  # people come before every model
        if not any(spec.priority >= victim.priority for spec in gainers):
            raise Broken(name, f"{action.instance} has priority {victim.priority}: {action.why}")
        if not any(_has_demand(step, spec) for spec in gainers):
            raise Broken(name, f"{action.instance} leaves for a model that nobody waits for: {action.why}")


def a_model_is_started_only_for_a_reason(step: Step) -> None:
    """Each start is wanted by the config or by demand, and no model gets more instances than it may have at once."""
    name = "a_model_is_started_only_for_a_reason"
    for action in step.starts():
        spec = step.spec(action.instance.model)
        by_hand = step.demand.wishes.get(action.instance.model)
        never = spec is not None and spec.run is RunMode.NEVER and not (by_hand and by_hand.load)
        if spec is None or never or action.candidate.backend not in spec.backends:
            raise Broken(name, f"{action.instance} is not wanted by the config")
        live = [view for view in step.observed.instances.values() if view.model == spec.name and view.state not in LEAVING]
        if not live and not _has_demand(step, spec):
            raise Broken(name, f"nobody waits for {action.instance}")
        goes = {ended.instance for ended in step.ends()}  # it may be replaced elsewhere at once
        same = [view for view in _awake(live) if view.fingerprint == action.candidate.fingerprint and view.id not in goes]
        new = sum(other.instance.model == spec.name for other in step.starts())
        if len(same) + new > max(spec.replicas.max, spec.replicas.min):
            raise Broken(name, f"{len(same)} + {new} instances of {spec.name}")


def a_spare_replica_is_started_only_where_requests_have_waited(step: Step) -> None:
    """Beyond the number that is always wanted, one at a time, when a request has waited for two seconds."""
    name = "a_spare_replica_is_started_only_where_requests_have_waited"
    for action in step.starts():
        spec, waiting = action.spec, step.demand.waiting.get(action.instance.model)
        live = [view for view in step.observed.instances.values() if view.model == spec.name and view.state not in LEAVING]
        goes = {ended.instance for ended in step.ends()}
        same = [view for view in _awake(live) if view.fingerprint == action.candidate.fingerprint and view.id not in goes]
        if len(same) < max(1, spec.replicas.min):
            continue
        if waiting is None or waiting.oldest > step.now - 2 + 1e-6 or any(v.state is not InstanceState.READY for v in same):
            raise Broken(name, f"{action.instance} beside {[str(view.id) for view in same]}, {waiting}")


def _awake(views: Iterable[InstanceView]) -> list[InstanceView]:
    """Those that serve, or will: one that sleeps where it cannot wake does not keep a fresh one from being started."""
    return [view for view in views if view.state is not InstanceState.SLEEPING]


def _has_demand(step: Step, spec: ModelSpec) -> bool:
    wish = step.demand.wishes.get(spec.name)
    always = spec.run is RunMode.ALWAYS if wish is None else wish.load
    return always or spec.name in step.demand.waiting


def a_permanently_broken_model_is_not_started_again(step: Step) -> None:
    """Not with the same fingerprint and the same file."""
    for action in step.starts():
        for record in _same_launch(step, action):
            if record.cause.permanent:
                raise Broken("a_permanently_broken_model_is_not_started_again", f"{action.instance}: {record.cause.message}")


def a_model_that_keeps_failing_backs_off_and_is_given_up(step: Step) -> None:
    """From the second failure in a row on, starts wait for at least three quarters of the backoff, which doubles."""
    name = "a_model_that_keeps_failing_backs_off_and_is_given_up"
    for action in step.starts():
        failures, last = _failures(_same_launch(step, action))
        policy = action.spec.restart
        if failures >= policy.give_up_after:
            raise Broken(name, f"{action.instance} is started after {failures} failures in a row")
        if failures >= 2 and step.now < last + 0.75 * _backoff(policy, failures) - 1e-6:
            raise Broken(name, f"{action.instance} is started {step.now - last} s after failure {failures} in a row")


def _backoff(policy: RestartPolicy, failures: int) -> float:
    return min(policy.max_backoff, policy.backoff * 2 ** (failures - 2))


def _failures(records: Sequence[ExitRecord]) -> tuple[int, float]:
    """Failures in a row and the time of the last; up to two lost races for a port are not counted."""
    row: list[ExitRecord] = []
    for record in reversed(records):
        proven = record.ready_for is not None and (record.expected or record.ready_for >= WELL)
        if not record.expected:
            row.append(record)
        if proven:
            break
    races = sum(record.cause.kind is ExitKind.PORT_TAKEN for record in row)
    return len(row) - (races if races < 3 else 0), row[0].at if row else 0.0


def _same_launch(step: Step, action: StartInstance) -> list[ExitRecord]:
    return step.exits(action.instance.model, action.candidate)


def what_ran_out_of_memory_is_given_more(step: Step) -> None:
    """The same launch is not started again with as little as the one that was too small, while that is remembered."""
    for action in step.starts():
        exits = _same_launch(step, action)
        wells = [index for index, record in enumerate(exits) if record.ready_for is not None and record.ready_for >= WELL]
        short = [r for r in exits[max(wells, default=-1) + 1 :] if r.cause.kind is ExitKind.OUT_OF_MEMORY]
        need, offers = action.candidate.estimate, step.observed.candidates[action.instance.model]
        predicted = next(offer.estimate for offer in offers if offer.backend == action.candidate.backend)
        if need is None or predicted is None or need.total < predicted.total * 1.15 ** len(short) - 1:
            raise Broken("what_ran_out_of_memory_is_given_more", f"{action.instance}: {need} after {len(short)}, of {predicted}")


def room_on_its_way_is_kept_for_the_first_in_line(step: Step) -> None:
    """While memory is being freed that lets the first waiter in, nobody behind it takes so much that it no longer would."""
    waiters = [spec for spec in step.desired.models.values() if _waits_for_room(step, spec)]
    if not waiters or not step.plan.accounts or step.loans_wait():
        return
    first = min(waiters, key=lambda spec: _rank(step, spec))
    needs = step.needs(first.name)
    if len(needs) != 1 or any(view.model == first.name and view.awake for view in step.observed.instances.values()):
        return  # which engine it is kept for depends on which of them backs off, and one that sleeps needs a place of its own
    coming = step.coming_room()
    first_rank = _rank(step, first)
    ranked = [(_rank(step, step.desired.models[model]), model, reserved) for model, reserved in step.promises()]
    behind = [(model, reserved) for rank, model, reserved in ranked if rank > first_rank]
    ahead = [reserved for rank, _, reserved in ranked if rank <= first_rank]
    for reserved in [*ahead, *(action.reserved for action in step.grants())]:
        step.add(coming, reserved, -1)
    if not behind or not step.fits(needs[0], first, coming):
        return
    for view in step.sent_away():
        step.add(coming, view.placement.reserved)
        step.add(coming, view.returning, -1)
    for action in step.sleeps():
        step.add(coming, step.view(action).placement.freed_asleep)
    for _, reserved in behind:
        step.add(coming, reserved, -1)
    if not step.fits(needs[0], first, coming):
        raise Broken(
            "room_on_its_way_is_kept_for_the_first_in_line",
            f"{first.name} needs {needs[0].total} of {coming}, taken by {[str(model) for model, _ in behind]}",
        )


def _waits_for_room(step: Step, spec: ModelSpec) -> bool:
    return spec.name in step.demand.waiting and step.plan.decisions[spec.name].state is ModelState.WAITING


def _rank(step: Step, spec: ModelSpec) -> tuple[int, float]:
    waiting = step.demand.waiting.get(spec.name)
    wish = step.demand.wishes.get(spec.name)
    since = float("-inf") if spec.run is RunMode.ALWAYS and wish is None else waiting.oldest if waiting else step.now
    if wish and wish.load:
        since = wish.since
    return (-spec.priority, since)


def no_more_is_evicted_than_the_waiters_need(step: Step) -> None:
    """Each single eviction is needed: without it, what is free or on its way would not be enough for those who wait."""
    evicted = [step.view(action) for action in step.stops() if action.reason is StopReason.EVICTED]
    if (
        not evicted
        or set(step.plan.accounts) != {HOST_RAM}
        or step.demand.loans
        or len({action.why for action in step.stops() if action.reason is StopReason.EVICTED}) > 1
    ):
        return  # of two who make room one after the other, the second may make the first's victim needless
    account = step.plan.accounts[HOST_RAM]
    needs = 0
    for spec in step.desired.models.values():
        fresh = sum(action.instance.model == spec.name for action in step.starts())
        if _has_demand(step, spec) or fresh:
            offers = [need.total for need in step.needs(spec.name)]
            needs += max(offers, default=0) * max(1, spec.replicas.min)
    freed = sum(view.placement.total for view in evicted)
    spare = account.room + account.releasing + freed - needs
    least = min(view.placement.total for view in evicted)
    if spare >= least > 0:
        raise Broken("no_more_is_evicted_than_the_waiters_need", f"{spare} to spare, {least} evicted")


def only_one_that_is_ready_and_idle_is_put_to_sleep(step: Step) -> None:
    """It has no request, it can sleep, and no such launch has failed to."""
    name = "only_one_that_is_ready_and_idle_is_put_to_sleep"
    for action in step.sleeps():
        view = step.view(action)
        if step.leases(view.id) or not view.placement.asleep or view.fault:
            raise Broken(name, f"{view.id}: {step.leases(view.id)} leases, {view.placement}")
        since = step.demand.forgiven.get(view.model, float("-inf"))
        exits = [one for one in step.world.exits.get(view.model, []) if one.fingerprint == view.fingerprint and one.at > since]
        if any(record.cause.kind is ExitKind.SLEEPLESS for record in exits[-EXITS_KEPT:]):
            raise Broken(name, f"{view.id} was seen to keep its memory asleep")


def a_promise_is_lowered_only_when_the_memory_is_really_back(step: Step) -> None:
    """The sleeper holds no more than what stays promised to it, and gave most of what it was to give."""
    for action in step.rests():
        view, process = step.view(action), step.world.processes[action.instance]
        for gpu, size in action.keeps.items():
            held = step.world.machine.held_by(view.id, gpu)
            if not process.dozes or held > size or size > view.placement.reserved[gpu]:
                raise Broken("a_promise_is_lowered_only_when_the_memory_is_really_back", f"{view.id} holds {held}, keeps {size}")


def one_that_can_sleep_is_not_stopped_for_being_idle(step: Step) -> None:
    """Sleep is tried first, unless it is stale or that has failed before."""
    for action in step.stops():
        view = step.view(action)
        if action.reason is not StopReason.IDLE or not any(view.placement.freed_asleep.values()) or view.misses:
            continue
        offers = step.observed.candidates.get(view.model, ())
        stale = not any(offer.fingerprint in ("", view.fingerprint) for offer in offers if offer.backend == view.backend)
        kept = any(record.cause.kind is ExitKind.SLEEPLESS for record in step.world.exits.get(view.model, []))
        if not stale and not kept and view.state is InstanceState.READY:
            raise Broken("one_that_can_sleep_is_not_stopped_for_being_idle", f"{view.id}: {action.why}")


def nobody_is_woken_but_for_demand(step: Step) -> None:
    """By a request, by hand, or since the model is to run always."""
    for action in step.wakes():
        spec = step.spec(action.instance.model)
        if spec is None or not _has_demand(step, spec):
            raise Broken("nobody_is_woken_but_for_demand", f"{action.instance}: {action.why}")


def every_model_gets_a_verdict(step: Step) -> None:
    """One decision per model of the config, with a sentence; a wait that time ends says when."""
    for name in step.desired.models:
        decision = step.plan.decisions.get(name)
        if decision is None or not decision.sentence:
            raise Broken("every_model_gets_a_verdict", f"{name}: {decision}")
        if decision.state is ModelState.BACKOFF and (decision.retry_at is None or (step.plan.wake_at or 1e18) > decision.retry_at):
            raise Broken("every_model_gets_a_verdict", f"{name} backs off and does not wake: {decision}")


def files_are_read_ahead_only_while_nobody_waits_and_nothing_loads(step: Step) -> None:
    """And of an on-demand model that is not there, into RAM that is free beside what was promised, with a good part to spare."""
    name, warm = "files_are_read_ahead_only_while_nobody_waits_and_nothing_loads", step.plan.warm
    if warm is None:
        return
    moves = (*SETTLING, *TURNING, InstanceState.DRAINING, InstanceState.STOPPING)
    moving = [view.id for view in step.observed.instances.values() if view.state in moves]
    if step.demand.waiting or step.starts() or moving or step.loans_wait():
        raise Broken(name, f"{warm.model} beside {sorted(step.demand.waiting)}, {step.starts()} and {moving}")
    spec, ram = step.spec(warm.model), step.observed.devices.get(HOST_RAM)
    if spec is None or spec.run is not RunMode.ON_DEMAND or any(key.model == warm.model for key in step.observed.instances):
        raise Broken(name, f"{warm.model} is not an on-demand model that is off")
    if ram is None or ram.free - step.world.due(HOST_RAM) - warm.size < ram.total / 10:
        raise Broken(name, f"{warm.size} of {warm.model} where memory is tight")


STEP: tuple[Callable[[Step], None], ...] = (
    *DEVICE_STEP,
    reserved_memory_stays_within_each_devices_limit_releasing_included,
    a_start_never_takes_memory_that_others_use_or_were_promised,
    an_instance_with_an_action_in_flight_gets_no_other,
    an_instance_that_holds_leases_is_not_stopped_before_its_drain_deadline,
    an_instance_is_found_at_fault_only_when_it_is,
    what_an_earlier_daemon_left_is_adopted_or_stopped_for_a_reason,
    a_pinned_instance_or_one_of_higher_priority_is_never_evicted,
    a_model_is_started_only_for_a_reason,
    a_permanently_broken_model_is_not_started_again,
    a_model_that_keeps_failing_backs_off_and_is_given_up,
    what_ran_out_of_memory_is_given_more,
    a_spare_replica_is_started_only_where_requests_have_waited,
    room_on_its_way_is_kept_for_the_first_in_line,
    no_more_is_evicted_than_the_waiters_need,
    only_one_that_is_ready_and_idle_is_put_to_sleep,
    a_promise_is_lowered_only_when_the_memory_is_really_back,
    one_that_can_sleep_is_not_stopped_for_being_idle,
    nobody_is_woken_but_for_demand,
    every_model_gets_a_verdict,
    files_are_read_ahead_only_while_nobody_waits_and_nothing_loads,
)


# Safety: what the planner says when it is asked again


def the_same_inputs_in_any_order_give_the_same_plan(step: Step, seed: int = 1) -> None:
    """Mappings are shuffled; only the order of `backends` and of exits has a meaning."""
    mix = random.Random(seed)

    def shuffled(mapping: object) -> dict[object, object]:
        pairs = list(mapping.items())  # type: ignore[attr-defined]
        mix.shuffle(pairs)
        return dict(pairs)

    desired = replace(step.desired, models=shuffled(step.desired.models))
    fields = ("instances", "devices", "candidates", "exits", "launches", "load_times")
    observed = replace(step.observed, **{name: shuffled(getattr(step.observed, name)) for name in fields})
    demand = replace(step.demand, **{name: shuffled(getattr(step.demand, name)) for name in DEMANDS})
    again = plan(desired, observed, demand, now=Instant(step.now))
    if again != step.plan:
        raise Broken("the_same_inputs_in_any_order_give_the_same_plan", f"{step.plan}\n{again}")


def a_missing_observation_never_causes_a_stop(step: Step) -> None:
    """Whoever leaves when memory or a model's facts cannot be read would leave as well if they could."""
    ends = {action.instance for action in step.ends()}
    unread = [replace(step.observed, devices={})]
    if not step.loans_wait():  # for a loan others leave when it is not known who is about to be replaced
        unread.append(replace(step.observed, candidates={}))
        unknown = {name: _unknown(offers) for name, offers in step.observed.candidates.items()}
        unread.append(replace(step.observed, candidates=unknown))
    for observed in unread:
        blind = plan(step.desired, observed, step.demand, now=Instant(step.now))
        more = [
            action for action in blind.actions if isinstance(action, StopInstance | DrainInstance) and action.instance not in ends
        ]
        if more:
            raise Broken("a_missing_observation_never_causes_a_stop", str(more))


def _unknown(offers: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(Candidate(backend=offer.backend, facts=ModelFacts()) for offer in offers)


def nothing_changes_before_the_plan_wakes(step: Step) -> None:
    """When a plan has nothing to do, time alone gives it nothing to do before `wake_at`."""
    if step.plan.actions:
        return
    last = step.now + 3600 if step.plan.wake_at is None else max(step.now, step.plan.wake_at)
    if last - step.now < 1e-3:  # as good as now, for a float
        return
    for share in (0.5, 0.999):
        later = step.now + (last - step.now) * share
        again = plan(step.desired, step.observed, step.demand, now=Instant(later))
        if again.actions:
            raise Broken(
                "nothing_changes_before_the_plan_wakes", f"{later - step.now} s later, wake at {step.plan.wake_at}: {again.actions}"
            )


REPLAN: tuple[Callable[[Step], None], ...] = (
    the_same_inputs_in_any_order_give_the_same_plan,
    a_missing_observation_never_causes_a_stop,
    nothing_changes_before_the_plan_wakes,
    *DEVICE_REPLAN,
)


def a_plan_that_was_carried_out_has_nothing_to_add(step: Step, after: Step) -> None:
    """Asked again at once, the planner plans nothing, unless forgetting or replacing an instance gave others new hope of room."""
    hope = any(
        isinstance(action, ForgetInstance | RestInstance) or "its config changed" in getattr(action, "why", "")
        for action in step.plan.actions
    )
    # With several devices, where a waiter's room is held may change when others begin to leave, and then more of them do.
    moved = len(step.observed.devices) > 1 and step.evictions()
    if after.plan.actions and not hope and not moved:
        raise Broken("a_plan_that_was_carried_out_has_nothing_to_add", f"{step.plan.actions}\nthen {after.plan.actions}")


# Liveness: where a run ends when no more faults come

PASSES = 400
"""Bound on planner cycles, and with at most 30 s between two of them on time, until a world without faults is settled."""


def faults_stop_and_the_world_settles(world: World) -> None:
    """Within PASSES cycles nothing is planned any more, nothing moves, and no request waits or runs."""
    for _ in range(PASSES):
        step = check_cycle(world)
        if not step.plan.actions and not world.requests and not _moving(world):
            return
        wakes = [at for at in (step.plan.wake_at, world.next_event()) if at is not None and at > world.now]
        world.advance(min([at - world.now for at in wakes] + [30.0]))
    decisions = {name: decision.sentence for name, decision in world.last_plan.decisions.items()}
    raise Broken("faults_stop_and_the_world_settles", f"{decisions}; {[str(request) for request in world.requests]}")


def _moving(world: World) -> bool:
    done = (InstanceState.READY, InstanceState.SLEEPING)
    if any(card.ghosts for card in world.machine.cards.values()):
        return True  # of processes that an earlier daemon knew
    return any(process.state not in done or process.hung_at is not None for process in world.processes.values()) or any(
        decision.state is ModelState.BACKOFF for decision in world.last_plan.decisions.values()
    )


def every_model_that_must_run_does_or_says_why(world: World) -> None:
    """In a settled world a model with run: always is ready, or has failed for good, or there is no room beside its betters."""
    step = take_step(world)
    for name, spec in world.desired.models.items():
        state = step.plan.decisions[name].state
        wish = world.wishes.get(name)
        if spec.run is not RunMode.ALWAYS or (wish and not wish.load) or state in (ModelState.READY, ModelState.FAILED):
            continue
        name_ = "every_model_that_must_run_does_or_says_why"
        if state is not ModelState.WAITING:
            raise Broken(name_, f"{name} is {state}: {step.plan.decisions[name].sentence}")
        room: dict[DeviceId, int] = {device: account.limit for device, account in step.plan.accounts.items()}
        for view in step.observed.instances.values():
            if (other := world.desired.models[view.model]).pinned or _stays(other, spec):
                step.add(room, view.placement.reserved, -1)
        for loan in step.demand.loans.values():
            step.add(room, loan.granted or {}, -step.weight(loan))
        short = step.plan.decisions[name].engines  # the others have a reason of their own
        offers = [offer for offer in step.observed.candidates[name] if short.get(offer.backend, "").startswith("needs")]
        needs = [taught(offer.estimate, step.exits(name, offer)) for offer in offers if offer.estimate]
        if any(step.fits(need, spec, room) for need in needs) and not step.loans_wait():
            raise Broken(name_, f"{name} waits although {room} could be had: {step.plan.decisions[name].sentence}")


def _stays(other: ModelSpec, spec: ModelSpec) -> bool:
    return (
        other.priority > spec.priority
        or other.name == spec.name
        or (other.run is RunMode.ALWAYS and other.priority == spec.priority)
    )


def every_request_ended(world: World) -> None:
    """Each was granted and ended, or was refused, cancelled or timed out."""
    if world.requests:
        raise Broken("every_request_ended", str(world.requests))


def every_loan_that_can_be_had_is_granted(world: World) -> None:
    """In a settled world a loan waits only when pinned models, other loans or the limit leave too little for it."""
    step = take_step(world)
    for loan in step.demand.loans.values():
        room: dict[DeviceId, int] = {device: account.limit for device, account in step.plan.accounts.items()}
        for view in step.observed.instances.values():
            if world.desired.models[view.model].pinned:
                step.add(room, view.placement.reserved, -1)
        for other in step.demand.loans.values():
            step.add(room, other.granted or {}, -step.weight(other))
        if loan.granted is None and loan_fits(step, loan, room) and len(_waiting_loans(step)) == 1:
            raise Broken("every_loan_that_can_be_had_is_granted", f"{room}: {step.plan.loans[loan.id]}")


def _waiting_loans(step: Step) -> list[str]:
    return [loan.id for loan in step.demand.loans.values() if loan.granted is None]


LIVENESS: tuple[Callable[[World], None], ...] = (
    faults_stop_and_the_world_settles,
    every_model_that_must_run_does_or_says_why,
    every_request_ended,
    every_loan_that_can_be_had_is_granted,
)


cycles = 0
"""How often that was done in this process."""


def check_cycle(world: World, *, replan: bool = True, actions: Callable[[Plan], Sequence[Action]] | None = None) -> Step:
    """One planner cycle under every safety property; `actions` picks which of the plan's are taken, and in which order."""
    global cycles
    cycles += 1
    step = take_step(world)
    for holds in STEP:
        holds(step)
    if replan:
        for holds in REPLAN:
            holds(step)
    chosen = step.plan.actions if actions is None else actions(step.plan)
    before = len(world.requests)
    world.apply(step.plan, chosen)
    if replan and len(chosen) == len(step.plan.actions) and before == len(world.requests):
        a_plan_that_was_carried_out_has_nothing_to_add(step, take_step(world))
    return step
