"""Memory for people: a loan is served before every model, and may have any of them leave that is not pinned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from offloadd.plan.draft import Draft
from offloadd.plan.placement import NoRoom, Room, Site, fits, room_on
from offloadd.plan.room import Claimant, Short, make_room
from offloadd.plan.sentences import short_sentence
from offloadd.state.actions import GrantLoan
from offloadd.state.demand import Loan
from offloadd.state.ids import DeviceId, DeviceKind
from offloadd.state.launch import Placement
from offloadd.units import Bytes, format_bytes


def serve_loans(draft: Draft) -> None:
    """Grant what fits, in the order in which it was asked for; make room for what does not."""
    for loan in sorted(draft.demand.loans.values(), key=lambda loan: (loan.since, loan.id)):
        if loan.granted is None:
            draft.loans[loan.id] = _serve(draft, loan)
        else:
            draft.loans[loan.id] = f"holds {_where(loan.granted, draft.site)}"


def _serve(draft: Draft, loan: Loan) -> str:
    attempt = partial(_place, loan, site=draft.site)
    answer = attempt(draft.ledger.room)
    if isinstance(answer, Placement) and not draft.may_give(answer.reserved):
        return (
            f"waits: needs {format_bytes(loan.size)} on {draft.site.label(next(iter(answer.reserved)))}, which is being read again"
        )
    if isinstance(answer, Placement):
        draft.grant(GrantLoan(loan=loan.id, reserved=answer.reserved))
        return f"is given {_where(answer.reserved, draft.site)}"
    if answer.never:
        draft.hopeless.add(loan.id)
        return f"cannot be had: it {answer.sentence}"
    claimant = Claimant("a loan", loan.why or "borrowed", loan.since, lambda spec: not spec.pinned)
    return short_sentence(draft, make_room(draft, claimant, [Short(answer, attempt)]))


def _place(loan: Loan, room: Room, site: Site) -> Placement | NoRoom:
    """On one device: the one asked for, else the GPU that is left with the least room, else RAM."""
    devices = _devices(loan, site)
    fitting = [(room[device], device) for device in devices if fits({device: loan.size}, room, site)]
    if fitting:
        return Placement(reserved={min(fitting)[1]: loan.size})
    if not devices:
        return NoRoom(need=loan.size, why=site.blind or f"there is no device {loan.device}")
    nearest = max(devices, key=lambda device: (site.accounts[device].limit, room.get(device, 0), device))
    limit, free = room_on(nearest, site.limits, site), room_on(nearest, room, site)
    return NoRoom(need=loan.size, device=nearest, label=site.label(nearest), room=free, limit=limit, never=loan.size > limit)


def _devices(loan: Loan, site: Site) -> list[DeviceId]:
    gpus = [view for view in site.devices.values() if view.kind is not DeviceKind.HOST]
    if loan.device == "auto":
        return [view.id for view in gpus or site.devices.values()] if not site.blind else []
    if loan.device == "host":
        return [view.id for view in site.devices.values() if view.kind is DeviceKind.HOST]
    return [view.id for view in gpus if loan.device == str(view.index) or view.id.name.startswith(loan.device)]


def _where(reserved: Mapping[DeviceId, Bytes], site: Site) -> str:
    return ", ".join(f"{format_bytes(size)} on {site.label(device)}" for device, size in reserved.items())
