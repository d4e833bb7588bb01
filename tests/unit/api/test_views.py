"""The ledger as it is shown, and its numbers as metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from offloadd.api import views
from offloadd.api.meters import Meters
from offloadd.api.metrics import PictureCollector, exposition
from offloadd.api.picture import ConfigStatus, Picture
from offloadd.api.problems import Problems, of_memory
from offloadd.plan.planner import plan
from offloadd.state.demand import Demand, Loan, Waiting
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind, ModelName
from offloadd.state.launch import Candidate, Placement, VramEstimate
from offloadd.state.observed import DeviceView, ForeignProcess, InstanceState, InstanceView, ObservedState
from offloadd.units import Bytes
from tests.unit.plan.build import NOW, gib, key, offer, ram, spec, unknown, view

GPUS = [DeviceId(LOCAL, f"GPU-{index}") for index in range(2)]


def gpu(index: int = 0, free: float = 23.5, **facts: Any) -> DeviceView:
    return DeviceView(
        id=GPUS[index], kind=DeviceKind.NVIDIA, name="card", index=index, total=gib(24), free=gib(free), **{"processes": {}} | facts
    )


def on_gpu(
    name: str, promised: float, taken: float | None, state: InstanceState = InstanceState.READY, **fields: Any
) -> InstanceView:
    placement = Placement(reserved={GPUS[0]: gib(promised)}, gpus=(GPUS[0],))
    measured = {} if taken is None else {GPUS[0]: gib(taken)}
    return view(name, promised, state, **{"placement": placement, "measured": measured, "peak": measured} | fields)


def layered(layers: int, size: float) -> Candidate:
    """An engine that can be divided: so many layers of so many GiB."""
    parts = (gib(size),) * layers
    estimate = VramEstimate(total=Bytes(sum(parts)), basis="given", layers=parts)
    return replace(offer(1), estimate=estimate)


def picture(
    *devices: DeviceView,
    instances: tuple[InstanceView, ...] = (),
    model: ModelSpec | None = None,
    offers: tuple[Candidate, ...] = (),
    demand: Demand | None = None,
    **observed: Any,
) -> Picture:
    desired = DesiredState(models={model.name: model} if model else {})
    seen = ObservedState(
        instances={each.id: each for each in instances},
        devices={each.id: each for each in devices},
        candidates={model.name: offers} if model else {},
        **observed,
    )
    demand = demand or Demand()
    config = ConfigStatus(generation=3, applied_wall=5.0, attempt_wall=5.0, attempt_ok=True, message="", diagnostics=(), shown={})
    return Picture(
        now=NOW,
        wall=10_000.0,
        started_wall=9_000.0,
        desired=desired,
        observed=seen,
        demand=demand,
        plan=plan(desired, seen, demand, now=NOW),
        config=config,
        problems=(),
        alive=True,
    )


def card(shown: Picture, device: DeviceId = GPUS[0]) -> Any:
    return next(each for each in views.vram_status(shown)["devices"] if each["id"] == device.name)


def test_what_is_ours_is_not_foreign() -> None:
    loan = Loan(id="loan-1", size=gib(3), since=NOW, granted={GPUS[0]: gib(3)}, measured={GPUS[0]: gib(2)})
    gone = on_gpu("c-1", 4, None, InstanceState.EXITED, unreleased={GPUS[0]: gib(4)})
    shown = picture(
        gpu(free=24 - 0.5 - 5 - 2 - 4 - 1),
        instances=(on_gpu("a-1", 6, 5), gone),
        demand=Demand(loans={"loan-1": loan}),
        foreign={GPUS[0]: (ForeignProcess(pid=7, name="game", size=gib(1)),)},
    )
    found = card(shown)
    assert found["foreign_bytes"] == gib(1.5)
    assert found["foreign"] == [{"pid": 7, "name": "game", "bytes": gib(1)}]
    assert found["lent_bytes"] == gib(3)
    assert found["releasing_bytes"] == gib(4)
    assert found["reserved_bytes"] == gib(13)
    assert [share["measured_bytes"] for share in found["instances"]] == [gib(5), None]
    assert views.vram_status(shown)["loans"][0]["reason"] == "holds 3.0 GiB on gpu0"


def test_room_is_never_shown_below_nothing() -> None:
    shown = picture(gpu(free=1), instances=(on_gpu("a-1", 10, 0),))
    assert card(shown)["room_bytes"] == 0


def test_devices_come_in_order_and_are_summed() -> None:
    status = views.vram_status(picture(gpu(1, 10), ram(), gpu(0, 20)))
    assert [each["id"] for each in status["devices"]] == ["host", "GPU-0", "GPU-1"]
    assert status["totals"]["free_bytes"] == gib(16 + 10 + 20)


def test_a_device_that_the_plan_has_not_seen_yet_is_shown() -> None:
    shown = picture(ram())
    later = replace(shown, observed=replace(shown.observed, devices={GPUS[0]: gpu()}))
    assert card(later)["room_bytes"] == card(later)["limit_bytes"] == int(24 * 2**30 * 0.95) - 512 * 2**20


def fits(offered: Candidate, *devices: DeviceView, instances: tuple[InstanceView, ...] = (), blind: str = "", **fields: Any) -> str:
    model = spec("a", **fields)
    shown = picture(*devices, instances=instances, model=model, offers=(offered,), blind=blind)
    return str(views.model(shown, model)["offloadd"]["fits"])


def test_whether_a_model_fits() -> None:
    busy = on_gpu("b-1", 18, 18)
    assert fits(offer(10), ram(), gpu()) == "now"
    assert fits(offer(10), ram(), gpu(free=5.5), instances=(busy,)) == "after eviction"
    assert fits(offer(23), ram(), gpu()) == "never"
    # Not what RAM has room for, where there are cards; and where there are none, or it is asked for, nothing else.
    assert fits(offer(30), ram(128, 128), gpu()) == "never"
    assert fits(offer(30), ram(128, 128)) == "now"
    assert fits(offer(30), ram(128, 128), gpu(), devices="cpu") == "now"
    assert fits(offer(10), ram(), gpu(0, 5.5), gpu(1), instances=(busy,), devices=("0",)) == "after eviction"


def test_whether_a_model_fits_on_several_cards() -> None:
    assert fits(layered(40, 1), ram(), gpu(0), gpu(1)) == "now"
    assert fits(layered(40, 1), ram(), gpu(0)) == "never"
    assert fits(layered(60, 1), ram(), gpu(0), gpu(1)) == "never"


def test_an_engine_that_cannot_use_the_card_fits_on_the_cpu() -> None:
    assert fits(replace(offer(10), gpus=frozenset()), ram(), gpu()) == "now"
    assert fits(replace(offer(20), gpus=frozenset()), ram(), gpu()) == "never"


def test_what_is_not_known_is_said_so() -> None:
    assert fits(unknown(), ram(), gpu()) == "unknown"
    assert fits(offer(10)) == "unknown"
    assert fits(offer(10), ram(), blind="the driver is gone") == "unknown"
    assert fits(offer(10), ram(), gpu(), devices=("7",)) == "unknown"


def test_a_card_that_is_gone_since_the_plan_is_not_asked() -> None:
    model = spec("a")
    shown = picture(ram(), gpu(), model=model, offers=(offer(10),))
    later = replace(shown, observed=replace(shown.observed, devices={HOST_RAM: ram()}, blind="it is gone"))
    assert views.model(later, model)["offloadd"]["fits"] == "unknown"


def test_what_was_learned_and_what_is_measured() -> None:
    model = spec("a")
    estimate = VramEstimate(total=gib(10), basis="measured on an earlier launch", learned=True)
    candidates = (replace(offer(1), estimate=estimate),)
    leaving = on_gpu("a-1", 10, 12, InstanceState.STOPPING)
    shown = picture(gpu(), model=model, offers=candidates, instances=(on_gpu("a-2", 10, 9), leaving))
    assert views.model(shown, model)["offloadd"]["vram"] == {
        "estimated": gib(10),
        "basis": "measured on an earlier launch",
        "learned": gib(10),
        "measured": gib(9),
    }
    nothing = picture(gpu(), model=model, offers=(unknown(),))
    assert views.model(nothing, model)["offloadd"]["vram"] == {"estimated": None, "basis": "", "learned": None, "measured": None}


@pytest.mark.parametrize(("taken", "reported"), [(None, False), (9, False), (10.9, False), (11.1, True)])
def test_one_that_takes_clearly_more_than_it_was_promised_is_reported(taken: float | None, reported: bool) -> None:
    found = dict(of_memory(picture(gpu(), instances=(on_gpu("a-1", 10, taken),)).observed))
    assert bool(found) is reported
    if reported:
        assert list(found) == ["a-1 takes 11.1 GiB on GPU-0, promised were 10.0 GiB"]


def test_a_problem_keeps_its_time_for_as_long_as_it_lasts() -> None:
    problems = Problems()
    assert [(each.since, each.hint) for each in problems.list({"it": "do"}, 5.0)] == [(5.0, "do")]
    assert [each.since for each in problems.list({"it": "do", "more": ""}, 7.0)] == [5.0, 7.0]
    assert problems.list({}, 8.0) == []
    assert [each.since for each in problems.list({"it": "do"}, 9.0)] == [9.0]


def test_metrics_are_the_numbers_of_the_ledger() -> None:
    model = spec("a")
    shown = picture(
        ram(),
        gpu(free=14, utilization=0.5, temperature=61.0, power_w=None),
        instances=(on_gpu("a-1", 10, 9),),
        model=model,
        offers=(offer(10),),
        demand=Demand(leases={key("a-1"): 2}, waiting={ModelName("a"): Waiting(count=3, oldest=NOW)}),
    )
    meters = Meters()
    meters.registry.register(PictureCollector(lambda: shown))
    families = {family.name: family for family in text_string_to_metric_families(exposition(meters)[0].decode())}
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert all(family.documentation for family in families.values())
    device = (("device", "GPU-0"), ("kind", "nvidia"))
    names = {"utilization": "utilization_ratio", "temperature_c": "temperature_celsius"}
    for name, number in card(shown).items():
        if name.endswith("_bytes") or name in names:
            assert values[f"offloadd_device_{names.get(name, name)}", device] == number
    assert ("offloadd_device_power_watts", device) not in values
    share = (("device", "GPU-0"), ("instance_id", "a-1"), ("model", "a"))
    assert values["offloadd_instance_measured_bytes", share] == gib(9)
    assert values["offloadd_model_waiting_requests", (("model", "a"),)] == 3
    assert values["offloadd_model_running_requests", (("model", "a"),)] == 2
    states = [value for (name, _), value in values.items() if name == "offloadd_model_state"]
    assert sum(states) == 1
    assert values["offloadd_scheduler_alive", ()] == 1
