"""What can be learned from instances that have run: the memory that a whole launch on one GPU really takes."""

from __future__ import annotations

from collections.abc import Iterable

from offloadd.state.launch import Footprint
from offloadd.state.observed import InstanceView
from offloadd.units import Bytes, Seconds

NEWS = 1.01
"""A peak that is higher than the one known by less than this is not worth a write."""


def learned(views: Iterable[InstanceView]) -> dict[str, Footprint]:
    """Peaks by footprint key, of instances that were measured while they were ready: one that still loads has not taken all.

    Only of those that lie whole on one GPU: there an engine takes all that it will take at its start. In RAM, pages are taken as
    they are touched, and a first look would teach too little.
    """
    found: dict[str, Footprint] = {}
    for view in views:
        if len(view.placement.gpus) != 1 or view.placement.split or view.ready_at is None or not view.footprint_key:
            continue
        gpu = view.placement.gpus[0]
        peak = view.peak.get(gpu) if view.measured.get(gpu) else None
        if peak and peak > found.get(view.footprint_key, Footprint(model=view.model, backend=view.backend, peak=Bytes(0))).peak:
            load = Seconds(view.ready_at - view.started_at)
            found[view.footprint_key] = Footprint(model=view.model, backend=view.backend, peak=peak, load_seconds=load)
    return found


def is_news(footprint: Footprint, known: Footprint | None) -> bool:
    """Whether it says more than what is known."""
    return known is None or footprint.peak > known.peak * NEWS
