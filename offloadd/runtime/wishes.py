"""WishBook: what operators asked for by hand. A wish lasts until the next one for its model, or until a config is applied."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace

from offloadd.clock import Clock
from offloadd.errors import RequestError
from offloadd.state.actions import Decision, ModelState, Plan
from offloadd.state.demand import Demand, Wish
from offloadd.state.ids import ModelName
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import Instant


class WishBook:
    """Who is to be loaded or unloaded by hand; those who wait for it are told after each plan."""

    def __init__(self, *, clock: Clock, wake: Callable[[], None], newest: Callable[[ModelName], int]) -> None:
        """`newest` gives the highest number that an instance of the model has had."""
        self._clock = clock
        self._newest = newest
        self._wake = wake
        self._wishes: dict[ModelName, Wish] = {}
        self._forgiven: dict[ModelName, Instant] = {}
        self._latest = (Plan(), ObservedState())
        self._plans = 0
        self._planned: asyncio.Future[None] | None = None

    def load(self, model: ModelName) -> None:
        """Load it now and keep it loaded; what made it fail before is forgiven. Asked for again, it is the same wish."""
        now = self._clock.now()
        self._forgiven[model] = now
        known = self._wishes.get(model)
        if known is None or not known.load:
            self._wishes[model] = Wish(load=True, since=now)
        self._wake()

    def unload(self, model: ModelName) -> None:
        """Unload it now. The next request for it loads it again, unless it never runs."""
        self._wishes[model] = Wish(load=False, since=self._clock.now(), newest=self._newest(model))
        self._wake()

    def yield_to_config(self, models: Collection[ModelName]) -> None:
        """The config was applied: it has the last word on everything, and knows only these models."""
        self._wishes.clear()
        self._forgiven = {model: at for model, at in self._forgiven.items() if model in models}

    def join(self, demand: Demand) -> Demand:
        """The demand with the wishes in it."""
        return replace(demand, wishes=dict(self._wishes), forgiven=dict(self._forgiven))

    def told(self, plan: Plan, observed: ObservedState) -> None:
        """A plan was made and begun: those who wait look whether it is as they wished."""
        self._latest = (plan, observed)
        self._plans += 1
        if self._planned is not None:
            planned, self._planned = self._planned, None
            planned.set_result(None)

    async def until_loaded(self, model: ModelName) -> Decision:
        """The decision that says that it is ready; RequestError when it fails, or when somebody wished otherwise meanwhile."""
        return await self._until(model, load=True, check=lambda plan, _: _loaded(model, plan))

    async def until_unloaded(self, model: ModelName) -> Decision:
        """The decision when all have ended that ran when the wish was made."""
        newest = self._wishes[model].newest
        return await self._until(model, load=False, check=lambda plan, observed: _unloaded(model, newest, plan, observed))

    async def _until(self, model: ModelName, *, load: bool, check: Callable[[Plan, ObservedState], Decision | None]) -> Decision:
        seen = self._plans
        while True:
            while self._plans == seen:
                await self._next_plan()
            seen = self._plans  # more than one may have been made before we got our turn: the latest counts
            found = check(*self._latest)
            if found is not None:
                return found
            wish = self._wishes.get(model)
            if wish is None or wish.load is not load:
                other = "the config was applied again" if wish is None else f"it was {'' if wish.load else 'un'}loaded by hand"
                raise RequestError(409, "wish_overtaken", f"{model}: no longer asked for, since {other} meanwhile")

    def _next_plan(self) -> Awaitable[None]:
        if self._planned is None:
            self._planned = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._planned)


def _loaded(model: ModelName, plan: Plan) -> Decision | None:
    decision = plan.decisions.get(model)
    if decision is not None and decision.state is ModelState.FAILED:
        raise RequestError(503, "model_failed", f"{model} cannot be loaded: {decision.sentence}")
    return decision if decision is not None and decision.state is ModelState.READY else None


def _unloaded(model: ModelName, newest: int, plan: Plan, observed: ObservedState) -> Decision | None:
    views = (view for view in observed.instances.values() if view.model == model and view.state is not InstanceState.EXITED)
    return None if any(view.id.number <= newest for view in views) else plan.decisions.get(model)
