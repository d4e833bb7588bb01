"""The line that `systemctl status` shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.api.picture import ConfigStatus, Picture
from offloadd.api.service import Service, status_line
from offloadd.plan.planner import plan
from offloadd.state.actions import Decision, ModelState
from offloadd.state.demand import Demand, Waiting
from offloadd.state.desired import DesiredState
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind, ModelName
from offloadd.state.observed import DeviceView, ObservedState
from offloadd.systemd import Manager
from tests.unit.plan.build import NOW, gib, ram, spec

GOOD = ConfigStatus(generation=1, applied_wall=0, attempt_wall=0, attempt_ok=True, message="", diagnostics=[], shown={})


def picture(states: dict[str, ModelState], *devices: DeviceView, config: ConfigStatus = GOOD, alive: bool = True) -> Picture:
    desired = DesiredState(models={ModelName(name): spec(name) for name in states})
    observed = ObservedState(devices={device.id: device for device in devices})
    answer = plan(desired, observed, Demand(), now=NOW)
    decisions = {ModelName(name): Decision(model=ModelName(name), state=state, sentence="") for name, state in states.items()}
    return Picture(
        now=NOW,
        wall=0,
        started_wall=0,
        desired=desired,
        observed=observed,
        demand=Demand(),
        plan=replace(answer, decisions=decisions),
        config=config,
        problems=(),
        alive=alive,
    )


def test_it_names_models_and_memory() -> None:
    card = DeviceView(
        id=DeviceId(LOCAL, "GPU-8f3e"), kind=DeviceKind.NVIDIA, name="card", index=1, total=gib(24), free=gib(24), processes={}
    )
    states = {"b": ModelState.READY, "a": ModelState.READY, "c": ModelState.OFF, "d": ModelState.LOADING, "e": ModelState.FAILED}
    line = status_line(picture(states, card, ram(16)))
    assert line.startswith("2 of 5 models ready (a, b), 1 failed, 1 loading; gpu1 0 B of 22.3 GiB; host 0 B of ")


def test_many_models_are_counted_only_and_waiting_requests_are_told() -> None:
    shown = picture({f"m{number}": ModelState.READY for number in range(7)})
    assert status_line(shown) == "7 of 7 models ready"
    waiting = Demand(waiting={ModelName("m1"): Waiting(count=3, oldest=NOW)})
    assert status_line(replace(shown, demand=waiting)) == "7 of 7 models ready; 3 waiting"


def test_what_is_wrong_stands_first() -> None:
    warning = {"severity": "warning", "file": "a.yaml", "line": 1, "column": 1, "message": "not this one", "hint": ""}
    error = {"severity": "error", "file": "a.yaml", "line": 7, "column": 5, "message": 'unknown key "x"', "hint": ""}
    refused = replace(GOOD, attempt_ok=False, diagnostics=[warning, error])
    line = status_line(picture({}, config=refused, alive=False))
    assert line == 'config refused: a.yaml:7:5: error: unknown key "x"; the scheduler does not progress; 0 of 0 models ready'
    unread = replace(GOOD, attempt_ok=False, message="cannot read a.yaml: Permission denied")
    assert status_line(picture({}, config=unread)).startswith("config refused: cannot read a.yaml: Permission denied; ")


def test_a_reload_is_ended_even_when_nothing_can_be_said_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Manager, "_tell", lambda _, *words, fds=(): said.append(words[0]) or True)

    def look() -> Picture:
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"), Service(Manager("/nowhere"), look).reloading():
        pass
    assert said == ["RELOADING=1", "READY=1"]
