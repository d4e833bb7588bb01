"""Which model's files to read into the page cache while nothing else is to be done, so that its next load reads from RAM."""

from __future__ import annotations

from offloadd.plan.draft import Draft
from offloadd.state.actions import Warm
from offloadd.state.desired import ModelSpec, RunMode
from offloadd.state.ids import HOST_RAM
from offloadd.state.launch import Candidate
from offloadd.state.observed import SETTLING, TURNING, InstanceState
from offloadd.units import Bytes, Instant, format_bytes, format_seconds

KEPT_FREE = 0.2
"""Share of RAM that stays free beside what was promised and the files: where memory is tight, others would be pushed out."""


def likely_next(draft: Draft) -> Warm | None:
    """The on-demand model that was used last and is not loaded; None where nobody asked for this, or it is no time for it."""
    if not draft.desired.storage.warm_next or draft.desired.closing or not _is_calm(draft):
        return None
    used = sorted(draft.demand.last_used.items(), key=lambda each: (-each[1], each[0]))
    specs = ((draft.desired.models.get(name), last) for name, last in used)
    return next((warm for spec, last in specs if spec is not None and (warm := _warm(draft, spec, last))), None)


def _is_calm(draft: Draft) -> bool:
    """Whether nobody waits, loads, or is on the way out to make room."""
    asked = draft.demand.waiting or draft.starts or any(loan.granted is None for loan in draft.demand.loans.values())
    moving = (*SETTLING, *TURNING, InstanceState.DRAINING, InstanceState.STOPPING)
    return not asked and not any(view.state in moving for view in draft.observed.instances.values())


def _warm(draft: Draft, spec: ModelSpec, last: Instant) -> Warm | None:
    if spec.run is not RunMode.ON_DEMAND or draft.instances(spec.name) or spec.name in draft.demand.wishes:
        return None
    offer = next((each for each in draft.observed.candidates.get(spec.name, ()) if _has_files(each)), None)
    if offer is None:
        return None
    facts = (offer.facts, *offer.facts.companions.values())
    size = Bytes(sum(each.size or 0 for each in facts))
    if not _has_room(draft, size):
        return None
    ago = format_seconds(draft.now - last)
    return Warm(
        model=spec.name,
        paths=tuple(each.read_from or each.path for each in facts),
        identity="|".join(each.identity for each in facts),
        size=size,
        sentence=f"{spec.name} was used {ago} ago and may be next: its {format_bytes(size)} are read into the page cache",
    )


def _has_files(offer: Candidate) -> bool:
    """Whether the engine would load files that are on this disk."""
    return not offer.problem and bool(offer.facts.size) and bool(offer.facts.identity)


def _has_room(draft: Draft, size: Bytes) -> bool:
    """Whether RAM holds the files without anything being pushed out, promises that are not taken yet counted in."""
    ram, books = draft.observed.devices.get(HOST_RAM), draft.ledger.accounts.get(HOST_RAM)
    return ram is not None and books is not None and ram.free - books.untaken - size >= KEPT_FREE * ram.total
