"""What another config would change, from how things are now. Nothing is changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from offloadd.api.preview import Change
from offloadd.backends.base import Backend
from offloadd.catalog import Catalog
from offloadd.clock import Clock
from offloadd.config import Loaded, SourceText, SystemSecrets, load
from offloadd.observe.snapshot import Observer
from offloadd.pictures import Pictures
from offloadd.plan.foresee import foresee
from offloadd.plan.placement import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Loads a config as a reload would, and follows the plans for it and for the present one in thought."""

    clock: Clock
    backends: Mapping[str, Backend]
    catalog: Catalog
    observer: Observer
    pictures: Pictures

    async def of(self, sources: Sequence[SourceText]) -> tuple[Loaded, Change | None]:
        """What this config would change; None when it is not good."""
        loaded = await asyncio.to_thread(load, sources, backends=self.backends, secrets=SystemSecrets())
        if loaded.desired is None:
            return loaded, None
        await self.catalog.prepare(loaded.desired)
        new = self.catalog.served_by(loaded.desired)
        candidates = await self.observer.preview(new)
        old, observed, demand = self.pictures.desired(), self.pictures.observed(), self.pictures.demand()
        now, site = self.clock.now(), Site(devices=observed.devices, accounts={})

        def follow() -> Change:
            applied = replace(demand, wishes={})  # which yield to a config that is applied
            return Change(
                old=old,
                new=replace(new, generation=old.generation),
                without=foresee(old, observed, demand, now=now),
                within=foresee(new, replace(observed, candidates=candidates), applied, now=now),
                labels={device: site.label(device) for device in observed.devices},
            )

        return loaded, await asyncio.to_thread(follow)
