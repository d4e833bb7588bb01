"""LoanBook: memory that people have asked for or hold. A loan lasts as long as the connection on which it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from offloadd.clock import Clock
from offloadd.errors import RequestError
from offloadd.state.actions import GrantLoan, Plan
from offloadd.state.demand import Loan
from offloadd.state.ids import DeviceId
from offloadd.units import Bytes

MAX_LOANS = 64


class LoanBook:
    """Who has borrowed what. Granted by the planner's word only."""

    def __init__(self, *, clock: Clock, wake: Callable[[], None], measured: Callable[[str], Mapping[DeviceId, Bytes]]) -> None:
        self._clock = clock
        self._wake = wake
        self._measured = measured
        self._loans: dict[str, Loan] = {}
        self._pids: dict[str, int] = {}
        self._answers: dict[str, asyncio.Future[Mapping[DeviceId, Bytes]]] = {}
        self._count = 0

    def ask(self, size: Bytes, device: str, why: str, pid: int | None) -> str:
        """Ask for memory; the loan's id. `pid` leads the processes that will use it. RequestError when there are too many."""
        if len(self._loans) >= MAX_LOANS:
            raise RequestError(429, "too_many_loans", f"{MAX_LOANS} loans are asked for or held already")
        self._count += 1
        name = f"loan-{self._count}"
        self._loans[name] = Loan(id=name, size=size, device=device, since=self._clock.now(), why=why)
        self._answers[name] = asyncio.get_running_loop().create_future()
        if pid is not None:
            self._pids[name] = pid
        self._wake()
        return name

    async def wait(self, name: str) -> Mapping[DeviceId, Bytes]:
        """Until it is granted; where the memory lies. RequestError 409 when it can never be had."""
        return await asyncio.shield(self._answers[name])

    def grant(self, action: GrantLoan) -> None:
        """The planner's word. One that was given back in the same moment is let go."""
        if action.loan in self._loans:
            self._loans[action.loan] = replace(self._loans[action.loan], granted=action.reserved)
            self._answer(action.loan).set_result(action.reserved)
            self._wake()

    def refuse(self, plan: Plan) -> None:
        """End the wait for loans that can never be had."""
        for name in plan.hopeless & self._answers.keys():
            if not self._answers[name].done():
                self._answer(name).set_exception(RequestError(409, "loan_impossible", plan.loans[name], param="size"))

    def _answer(self, name: str) -> asyncio.Future[Mapping[DeviceId, Bytes]]:
        """The loan's answer, now to be given; whoever asked may have left without waiting for it."""
        answer = self._answers[name]
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer

    def give_back(self, name: str) -> None:
        """It is over, granted or not."""
        self._loans.pop(name, None)
        self._answers.pop(name, None)
        self._pids.pop(name, None)
        self._wake()

    def loans(self) -> dict[str, Loan]:
        """All of them, with what their holders have taken."""
        return {name: replace(loan, measured=self._measured(name)) for name, loan in self._loans.items()}

    def pids(self) -> dict[str, int]:
        """Leaders of the borrowers' process trees, as far as they were named."""
        return dict(self._pids)
