"""Wake what sleeps of a model that is wanted again: in the room that is there, or in room that is made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from offloadd.plan.draft import Draft
from offloadd.plan.placement import NoRoom, Room, Site, fits, room_on
from offloadd.plan.room import Short, for_model, make_room
from offloadd.plan.sentences import short_sentence
from offloadd.plan.wants import Want
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Placement
from offloadd.state.observed import InstanceState, InstanceView
from offloadd.units import Bytes


@dataclass(slots=True)
class Rousing:
    """What came of it."""

    waits: str = ""
    """Why one of them cannot wake yet; empty when none has to wait."""
    lost: list[InstanceView] = field(default_factory=list)
    """Those that cannot be woken where they are, whoever left for them: a fresh one may have a place elsewhere."""


def sleepers(views: Sequence[InstanceView]) -> list[InstanceView]:
    """Those of them that can be woken."""
    return [view for view in views if view.state is InstanceState.SLEEPING]


def rouse(draft: Draft, want: Want, fresh: Sequence[InstanceView]) -> Rousing:
    """Wake as many as are missing, and of each engine that waiting requests name one."""
    answer = Rousing()
    asleep = sleepers(fresh)
    if not want.urgent or not asleep:
        return answer
    awake = [view for view in fresh if view not in asleep]
    named = set(draft.demand.waiting_for.get(want.spec.name, frozenset())) - {view.backend for view in awake}
    missing = want.count - len(awake)
    for view in sorted(asleep, key=lambda view: (view.backend not in named, _rank(want, view), view.id)):
        if view.backend not in named and missing <= 0:
            continue
        named.discard(view.backend)
        missing -= 1
        if not draft.acted_on(view):
            _rouse(draft, want, view, answer)
    return answer


def rouse_spare(draft: Draft, want: Want, view: InstanceView) -> None:
    """Wake one more, if that needs nobody else's room."""
    more = _missing(view)
    if isinstance(_in_place(view, more, draft.ledger.room, draft.site), Placement) and _may_take(draft, view, more) is None:
        draft.rouse(view, want.why)


def _rouse(draft: Draft, want: Want, view: InstanceView, answer: Rousing) -> None:
    more = _missing(view)
    attempt = partial(_in_place, view, more, site=draft.site)
    place = attempt(draft.ledger.room)
    if isinstance(place, Placement):
        held_up = _may_take(draft, view, more)
        if held_up is None:
            draft.rouse(view, want.why)
        answer.waits = held_up or answer.waits
        return
    if place.device is None:  # it cannot be asked now: unknown is not gone
        answer.waits = f"waits: {place.sentence}"
        return
    making = make_room(draft, for_model(draft, want), [Short(place, attempt)])
    if making.hopeless:
        answer.lost.append(view)
    else:
        answer.waits = short_sentence(draft, making)


def _may_take(draft: Draft, view: InstanceView, more: Mapping[DeviceId, Bytes]) -> str | None:
    """Why it cannot take the room that is there just now; the room is then held for it."""
    ahead = draft.loads_there(view.placement, sizes_itself=False)
    if ahead is not None:
        draft.ledger.claim(more)
        return f"waits until {ahead} has loaded, which measures the GPU meanwhile"
    if not draft.may_give(more):
        return f"is woken when {draft.site.label(next(iter(more)))} has been read again"
    return None


def _missing(view: InstanceView) -> dict[DeviceId, Bytes]:
    """What it is not promised now and needs awake."""
    awake = view.awake or view.placement
    now = view.placement.reserved
    return {device: Bytes(size - now.get(device, 0)) for device, size in awake.reserved.items() if size > now.get(device, 0)}


def _in_place(view: InstanceView, more: Mapping[DeviceId, Bytes], room: Room, site: Site) -> Placement | NoRoom:
    """Where it is, or what is short there: it cannot move."""
    if fits(more, room, site):
        return Placement(reserved=more, gpus=view.placement.gpus)
    unread = [device for device in more if device not in site.accounts]
    if unread:
        return NoRoom(need=Bytes(sum(more.values())), why=site.blind or f"{unread[0]} cannot be read")
    short = min(more, key=lambda device: (room_on(device, room, site) - more[device], device))
    return NoRoom(
        need=more[short],
        device=short,
        label=site.label(short),
        room=room_on(short, room, site),
        limit=site.accounts[short].limit,
    )


def _rank(want: Want, view: InstanceView) -> int:
    backends = want.spec.backends
    return backends.index(view.backend) if view.backend in backends else len(backends)
