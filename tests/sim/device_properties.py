"""What must hold of every plan on a machine with several memories: GPUs, RAM beside them, and people who borrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from offloadd.plan.planner import plan
from offloadd.state.actions import DrainInstance, GrantLoan, ModelState, Plan, SleepInstance, StartInstance, StopInstance
from offloadd.state.demand import Loan
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import HOST_RAM, DeviceId
from offloadd.state.launch import ExitKind, Placement, VramEstimate
from offloadd.state.observed import LEAVING, DeviceView, InstanceState, InstanceView
from offloadd.units import Instant
from tests.sim.step import Broken, Step

SLACK = 1e-6


def no_memory_is_overdrawn_unless_others_took_what_was_promised(step: Step) -> None:
    """What ours, the ended and all others use is never more than there is, save where a program grabbed promised memory."""
    machine = step.world.machine
    for card in machine.cards.values():
        balance = machine.balance(card.id)
        if card.unified or not card.is_gpu:
            # While a unified GPU is not read, nobody knows that its promises lie in RAM: then we may rob ourselves.
            card.robbed = card.robbed or step.unified_is_unread()
        if balance >= step.world.due(card.id) and not step.unified_is_unread():
            card.robbed = False
        if balance < 0 and not card.robbed:
            raise Broken("no_memory_is_overdrawn_unless_others_took_what_was_promised", f"{card.id} by {-balance}")


def a_placement_is_made_of_the_estimates_parts(step: Step) -> None:
    """Each device's promise is its layers and the fixed part, or the whole; RAM beside it is promised too; the split adds up."""
    for action in step.starts():
        need = action.candidate.estimate
        assert need is not None
        wrong = _misfit(step, action.spec, need, action.placement)
        if wrong:
            raise Broken("a_placement_is_made_of_the_estimates_parts", f"{action.instance}: {wrong}: {action.placement}")


def _misfit(step: Step, spec: ModelSpec, need: VramEstimate, placement: Placement) -> str:
    gpus, split = placement.gpus, placement.split
    unseen = [device for device in placement.reserved if device not in step.observed.devices]
    if unseen:
        return f"{unseen} are not read"
    if len(set(gpus)) != len(gpus):
        return "a GPU stands twice"
    if dict(placement.reserved) != _expected(need, gpus, split):
        return f"expected {_expected(need, gpus, split)}"
    if len(split) not in (0, len(gpus)) or (len(gpus) > 1 and not split):
        return "the split is not one number for each GPU"
    if any(count < 1 for count in split):
        return "a GPU without a layer"
    return _misuse(step, spec, need, placement)


def _expected(need: VramEstimate, gpus: tuple[DeviceId, ...], split: tuple[int, ...]) -> dict[DeviceId, int]:
    if not gpus:
        return {HOST_RAM: need.total if need.on_host is None else need.on_host}
    if not split:
        return _beside({gpus[0]: need.total}, need.host)
    first = len(need.layers) - sum(split)
    rest, start = sum(need.layers[:first]), first
    sizes: dict[DeviceId, int] = {}
    for device, count in zip(gpus, split, strict=True):
        sizes[device] = need.fixed + sum(need.layers[start : start + count])
        start += count
    return _beside(sizes, need.host + rest)


def _beside(sizes: dict[DeviceId, int], host: int) -> dict[DeviceId, int]:
    return {**sizes, HOST_RAM: host} if host else sizes


def _misuse(step: Step, spec: ModelSpec, need: VramEstimate, placement: Placement) -> str:
    """What of the config it breaks."""
    views = [step.observed.devices[device] for device in placement.gpus]
    counted = isinstance(spec.gpu_layers, int) and bool(need.layers)
    if spec.devices == "cpu" or spec.gpu_layers == 0:
        return "it asked for the CPU" if views else ""
    if not views:
        return ""  # whether GPUs are there is another property's matter
    if len(views) > 1 and any(view.slice_of for view in views):
        return "divided over slices"
    if counted and placement.split != (min(int(spec.gpu_layers), len(need.layers)),):
        return f"gpu_layers is {spec.gpu_layers}"
    if sum(placement.split) not in (0, len(need.layers)) and not (counted or spec.partial):
        return "some layers are left on the CPU"
    if isinstance(spec.devices, tuple):
        return _misnamed(spec, views, counted=counted or spec.partial)
    indexes = [view.index for view in views]
    return "" if indexes == sorted(indexes) else "GPUs are out of order"


def _misnamed(spec: ModelSpec, views: list[DeviceView], *, counted: bool) -> str:
    if not all(any(_is_named(name, view) for name in spec.devices) for view in views):
        return f"devices are {spec.devices}"
    if not counted and not all(any(_is_named(name, view) for view in views) for name in spec.devices):
        return f"not all of {spec.devices} are used"
    return ""


def _is_named(name: str, view: DeviceView) -> bool:
    return name == str(view.index) or view.id.name.startswith(name)


def what_belongs_on_gpus_is_not_started_on_the_cpu_because_they_cannot_be_read(step: Step) -> None:
    """The CPU is for those that ask for it, and for all where there is no GPU; not while GPUs are there and unread."""
    if not step.world.machine.gpus:
        return
    for action in step.starts():
        if not action.placement.gpus and action.spec.devices != "cpu" and action.spec.gpu_layers != 0:
            name = "what_belongs_on_gpus_is_not_started_on_the_cpu_because_they_cannot_be_read"
            raise Broken(name, f"{action.instance}: {step.observed.blind}")


def every_loan_is_granted_or_told_why_it_waits(step: Step) -> None:
    """Each cycle, each loan; and what is granted is what was asked for, once, where it was asked for."""
    name = "every_loan_is_granted_or_told_why_it_waits"
    grants = {action.loan: action for action in step.grants()}
    if len(grants) != len(step.grants()):
        raise Broken(name, f"granted twice: {step.grants()}")
    for loan in step.demand.loans.values():
        said = step.plan.loans.get(loan.id, "")
        grant = grants.pop(loan.id, None)
        if loan.granted is not None:
            if grant or not said.startswith("holds "):
                raise Broken(name, f"{loan.id} is granted already: {said!r}, {grant}")
        elif grant is not None:
            _check_grant(step, loan, grant)
        elif not said.startswith(("waits: needs ", "cannot be had: it needs ")):
            raise Broken(name, f"{loan.id} waits, and hears {said!r}")
    if grants:
        raise Broken(name, f"nobody asked for {grants}")


def _check_grant(step: Step, loan: Loan, grant: GrantLoan) -> None:
    device = next(iter(grant.reserved))
    view = step.observed.devices.get(device)
    asked = loan.device in ("auto", "host" if device == HOST_RAM else "") or (view is not None and _is_named(loan.device, view))
    if dict(grant.reserved) != {device: loan.size} or view is None or not asked:
        raise Broken("every_loan_is_granted_or_told_why_it_waits", f"{loan}: {grant}")


def a_loan_stays_on_the_books_until_it_is_given_back(step: Step) -> None:
    """Each account says what is lent, and counts it as promised."""
    for device, account in step.plan.accounts.items():
        lent = sum(step.on_pool(loan.granted or {}, device) for loan in step.demand.loans.values())
        if account.lent != lent or account.reserved < lent:
            raise Broken("a_loan_stays_on_the_books_until_it_is_given_back", f"{account}: {lent} lent")


def nobody_is_evicted_before_it_stayed_as_long_as_its_load_took(step: Step) -> None:
    """One to fifteen seconds: else two models in turn would do nothing but load."""
    for action in step.evictions():
        view = step.view(action)
        if view.state is InstanceState.READY and view.ready_at is not None:
            stay = min(15.0, max(1.0, view.ready_at - view.started_at))
            if step.now < view.ready_at + stay - SLACK:
                name = "nobody_is_evicted_before_it_stayed_as_long_as_its_load_took"
                raise Broken(name, f"{view.id} was ready for {step.now - view.ready_at} s after a load of {stay} s: {action.why}")


def nobody_is_evicted_in_vain_nor_without_need(step: Step) -> None:
    """When all whom a waiter sends away have left, it fits; and without any one of them it would not."""
    reasons = {action.why.partition(";")[0] for action in step.evictions()}
    if len(reasons) != 1 or step.starts() or step.grants() or step.wakes():
        return  # with several changes in one plan, each is judged in a room that is not known here
    reason = next(iter(reasons))
    if step.unified_is_unread() or any(step.world.machine.balance(device) < 0 for device in step.world.machine.cards):
        return  # a reading cannot show how far others' grabbing has overdrawn it
    if any(_leaks(step, view) for view in step.observed.instances.values()):
        return  # of one that holds more than it was promised, more comes back than anybody counts on
    has_place = _place_of(step, reason)
    others_wait = [
        name
        for name, decision in step.plan.decisions.items()
        if "waits: needs" in decision.sentence and f"make room for {name} (" not in reason
    ]
    if has_place is None or others_wait or any(view.state is InstanceState.EXITED for view in step.observed.instances.values()):
        return
    room = _true_room_after(step)
    if not has_place(room):
        raise Broken("nobody_is_evicted_in_vain_nor_without_need", f"{reason}: {room} is not enough")
    for action in step.evictions():
        view = step.view(action)
        asleep = isinstance(action, SleepInstance)
        without = _true_room_after(step, ghosts=False)  # what is late to come back may not be waited for any more
        step.add(without, view.placement.freed_asleep if asleep else view.placement.reserved, -1)
        if has_place(without):
            raise Broken("nobody_is_evicted_in_vain_nor_without_need", f"{reason}: {view.id} need not go")
        step.add(without, view.placement.freed_asleep)
        if not asleep and _could_sleep(step, view) and has_place(without):
            raise Broken("nobody_is_evicted_in_vain_nor_without_need", f"{reason}: it is enough that {view.id} sleeps")


def _could_sleep(step: Step, view: InstanceView) -> bool:
    kept = any(record.cause.kind is ExitKind.SLEEPLESS for record in step.world.exits.get(view.model, []))
    return view.state is InstanceState.READY and any(view.placement.freed_asleep.values()) and not (kept or step.leases(view.id))


def _leaks(step: Step, view: InstanceView) -> bool:
    held = step.world.machine.held.get(view.id, {})
    return any(size > view.placement.reserved.get(device, 0) + 1 for device, size in held.items())


def _place_of(step: Step, reason: str) -> Callable[[Mapping[DeviceId, int]], bool] | None:
    """How to tell whether the one who makes room has a place; None where that is not one plain question."""
    if "make room for a loan (" in reason:
        waiting = [loan for loan in step.demand.loans.values() if loan.granted is None]
        return partial(loan_fits, step, waiting[0]) if len(waiting) == 1 else None
    spec = next((spec for spec in step.desired.models.values() if f"make room for {spec.name} (" in reason), None)
    if spec is not None and (asleep := [v for v in step.observed.instances.values() if v.model == spec.name and v.awake]):
        more = step.missing_awake(asleep[0])
        return (lambda room: all(room.get(each, 0) >= size for each, size in more.items())) if len(asleep) == 1 else None
    if spec is None or step.loans_wait() or spec.replicas.min > 1 or len(step.needs(spec.name)) != 1:
        return None
    return partial(step.fits, step.needs(spec.name)[0], spec)


def loan_fits(step: Step, loan: Loan, room: Mapping[DeviceId, int]) -> bool:
    views = step.observed.devices.values()
    gpus = [view.id for view in views if view.id != HOST_RAM]
    if loan.device == "auto":
        places = gpus or [HOST_RAM]
    else:
        places = [HOST_RAM] if loan.device == "host" else [v.id for v in views if v.id in gpus and _is_named(loan.device, v)]
    return any(all(room.get(each, 0) >= loan.size for each in step.pool(place)) for place in places)


def _true_room_after(step: Step, *, ghosts: bool = True) -> dict[DeviceId, int]:
    """Per device that is read: what the limit and the truth leave when all who are leaving have left."""
    world = step.world
    leaving = {view.id for view in step.observed.instances.values() if view.state in LEAVING} | {
        action.instance for action in step.ends()
    }
    dozing = [view for view in step.observed.instances.values() if view.state is InstanceState.FALLING_ASLEEP]
    dozing += [step.view(action) for action in step.sleeps()]
    room: dict[DeviceId, int] = {}
    for device, account in step.plan.accounts.items():
        stays = [view for view in step.observed.instances.values() if view.id not in leaving]
        promised = sum(step.on_pool(view.placement.reserved, device) for view in stays)
        promised += sum(step.on_pool(loan.granted or {}, device) for loan in step.demand.loans.values())
        pool = world.machine.pool(device)
        goes = sum(world.machine.held_by(key, card.id) for key in leaving for card in pool)
        due = world.due(device) - sum(
            max(0, size - world.machine.held_by(key, each))
            for key in leaving
            if not world.processes[key].gone
            for each, size in world.processes[key].placement.reserved.items()
            if each in {card.id for card in pool}
        )
        unmeasured = sum(_unmeasured(step, loan, device) for loan in step.demand.loans.values())
        late = sum(card.ghosts for card in pool) if ghosts else 0
        back = sum(step.on_pool(view.placement.freed_asleep, device) for view in dozing if view.id not in leaving)
        free = world.machine.balance(device) + goes + late - due - unmeasured
        room[device] = min(account.limit - promised, free) + back
    return room


def _unmeasured(step: Step, loan: Loan, device: DeviceId) -> int:
    """What a borrower has taken that nobody can see to be its own: it counts as not taken yet."""
    if loan.id not in step.world.unnamed:
        return 0
    return sum(step.world.machine.held_by(loan.id, each) for each in loan.granted or {} if each in step.pool(device))


DEVICE_STEP: tuple[Callable[[Step], None], ...] = (
    no_memory_is_overdrawn_unless_others_took_what_was_promised,
    a_placement_is_made_of_the_estimates_parts,
    what_belongs_on_gpus_is_not_started_on_the_cpu_because_they_cannot_be_read,
    every_loan_is_granted_or_told_why_it_waits,
    a_loan_stays_on_the_books_until_it_is_given_back,
    nobody_is_evicted_before_it_stayed_as_long_as_its_load_took,
    nobody_is_evicted_in_vain_nor_without_need,
)


def gpus_that_cannot_be_read_cause_neither_a_stop_nor_a_start_on_the_cpu(step: Step) -> None:
    """The same picture without its GPUs: nobody leaves but who leaves anyway, and no model is sent to the CPU."""
    if not step.world.machine.gpus or any(card.unified for card in step.world.machine.gpus):
        return  # who lies on a unified GPU lies in RAM, which can be seen to be short
    hosts = {device: view for device, view in step.observed.devices.items() if device == HOST_RAM}
    again = _plan_without(step, hosts, "the driver does not answer")
    waits = step.loans_wait() or any("waits: needs" in decision.sentence for decision in step.plan.decisions.values())
    if not (waits or step.starts() or step.grants()):  # what these claim and cannot use now, others may make room for
        _no_more_ends(step, again, "gpus_that_cannot_be_read_cause_neither_a_stop_nor_a_start_on_the_cpu")
    for action in again.actions:
        if isinstance(action, StartInstance) and action.spec.devices != "cpu" and action.spec.gpu_layers != 0:
            raise Broken("gpus_that_cannot_be_read_cause_neither_a_stop_nor_a_start_on_the_cpu", f"starts {action.instance}")


def a_gpu_that_falls_off_the_bus_stops_nobody_on_it(step: Step) -> None:
    """Those elsewhere may still make room for a waiter, those on it are left alone."""
    for gone in list(step.observed.devices):
        if len(step.pool(gone)) > 1:
            continue  # its memory is read under another name
        left = {device: view for device, view in step.observed.devices.items() if device != gone}
        blind = "" if any(device != HOST_RAM for device in left) else "it does not answer"
        again = _plan_without(step, left, blind)
        only = {key for key, view in step.observed.instances.items() if set(view.placement.reserved) <= {gone}}
        ends = {action.instance for action in step.ends()}
        for action in again.actions:
            if isinstance(action, StopInstance | DrainInstance) and action.instance in only - ends:
                raise Broken("a_gpu_that_falls_off_the_bus_stops_nobody_on_it", f"{gone}: {action}")


def no_model_is_given_up_because_ram_cannot_be_read(step: Step) -> None:
    """Whether the part beside a GPU fits is not known then; that is no reason to say that it never will."""
    left = {device: view for device, view in step.observed.devices.items() if device != HOST_RAM}
    again = _plan_without(step, left, step.observed.blind)
    for name, decision in again.decisions.items():
        if decision.state is ModelState.FAILED and step.plan.decisions[name].state is not ModelState.FAILED:
            raise Broken("no_model_is_given_up_because_ram_cannot_be_read", decision.sentence)


def _plan_without(step: Step, devices: dict[DeviceId, DeviceView], blind: str) -> Plan:
    observed = replace(step.observed, devices=devices, blind=blind)
    return plan(step.desired, observed, step.demand, now=Instant(step.now))


def _no_more_ends(step: Step, again: Plan, name: str) -> None:
    ends = {action.instance for action in step.ends()}
    more = [action for action in again.actions if isinstance(action, StopInstance | DrainInstance) and action.instance not in ends]
    if more:
        raise Broken(name, str(more))


DEVICE_REPLAN: tuple[Callable[[Step], None], ...] = (
    gpus_that_cannot_be_read_cause_neither_a_stop_nor_a_start_on_the_cpu,
    a_gpu_that_falls_off_the_bus_stops_nobody_on_it,
    no_model_is_given_up_because_ram_cannot_be_read,
)
