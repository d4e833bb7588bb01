"""What an operator should know about, each with since when and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from offloadd.api.picture import Problem
from offloadd.state.actions import ModelState, Plan
from offloadd.state.demand import Demand
from offloadd.state.desired import DesiredState
from offloadd.state.launch import ExitKind
from offloadd.state.observed import InstanceState, ObservedState
from offloadd.units import format_bytes, gist

DRIFT = 1.1
"""An instance that takes more than this multiple of what it was promised is reported."""


class Problems:
    """Remembers since when each problem has been there."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def list(self, found: Mapping[str, str], wall: float) -> list[Problem]:
        """The problems (text and hint) as of now, in Unix seconds. Numbers in a text change, and it is the same problem still."""
        gists = {what: gist(what) for what in found}
        self._since = {gist: self._since.get(gist, wall) for gist in gists.values()}
        return [Problem(what=what, since=self._since[gists[what]], hint=hint) for what, hint in found.items()]


def of_models(plan: Plan) -> Iterable[tuple[str, str]]:
    """Models that cannot be served."""
    for name, decision in plan.decisions.items():
        if decision.state in (ModelState.FAILED, ModelState.BACKOFF):
            yield f"{name} {decision.state}: {decision.sentence}", decision.hint


def of_listeners(observed: ObservedState) -> Iterable[tuple[str, str]]:
    """Instances that can be reached from a network, past our keys."""
    for view in observed.instances.values():
        if view.exposed:
            text = f"{view.id} listens beyond loopback, on {', '.join(view.exposed)}: whoever reaches that passes our keys by"
            yield text, "have it listen on 127.0.0.1 (vLLM: env VLLM_HOST_IP), or close the ports by a firewall"


def of_memory(observed: ObservedState) -> Iterable[tuple[str, str]]:
    """Instances that take clearly more than they were promised."""
    for view in observed.instances.values():
        for device, promised in view.placement.reserved.items():
            taken = view.measured.get(device, 0)
            if taken > promised * DRIFT:
                text = f"{view.id} takes {format_bytes(taken)} on {device}, promised were {format_bytes(promised)}"
                yield text, "its next launch is given what was measured; set vram to say so now"


def of_processes(observed: ObservedState) -> Iterable[tuple[str, str]]:
    """Processes that do not end, and instances that cannot do their work."""
    for view in observed.instances.values():
        if view.stuck:
            held = format_bytes(view.placement.total)
            text = f"{view.id} (pid {view.pid}) does not end by SIGKILL; its {held} stay reserved"
            yield text, "the kernel holds it, mostly in a driver: see dmesg; a reboot may be needed"
        elif view.fault and view.state is not InstanceState.EXITED:  # that one is on the books for its memory only
            yield f"{view.id}: {view.fault}", "it is replaced; see its log if that comes again"


def of_sleep(observed: ObservedState, demand: Demand) -> Iterable[tuple[str, str]]:
    """Models whose present launch was to sleep and kept its memory, unless that was forgiven by hand."""
    for model, exits in observed.exits.items():
        present = {offer.fingerprint for offer in observed.candidates.get(model, ())}
        kept = [record for record in exits if record.cause.kind is ExitKind.SLEEPLESS and record.fingerprint in present]
        last = kept[-1] if kept else None
        if last is not None and last.at > demand.forgiven.get(model, float("-inf")):
            yield f"{model} is stopped where it should sleep, since {last.instance} did not: {last.cause.message}", last.cause.hint


def changed_at_start(begun: DesiredState, present: DesiredState) -> Iterable[str]:
    """Settings that are read at the start only, and that the config in force has otherwise."""
    if begun.server.listen != present.server.listen:
        yield "server.listen"
    if begun.server.max_body != present.server.max_body:
        yield "server.max_body"
    if begun.storage.data_dir != present.storage.data_dir:
        yield "storage.data_dir"
    if begun.storage.registry != present.storage.registry:
        yield "storage.registry"
