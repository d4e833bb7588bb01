"""Which engine serves a model: the first that has room, whatever it is, and the next when one fails."""

from __future__ import annotations

from dataclasses import replace

from offloadd.plan.planner import plan
from offloadd.state.actions import Plan, StartInstance
from offloadd.state.demand import Demand
from offloadd.state.desired import BackendKind, DesiredState, Engine, RunMode
from offloadd.state.ids import HOST_RAM, LOCAL, DeviceId, DeviceKind, InstanceId, ModelName
from offloadd.state.launch import Candidate, Placement, VramEstimate
from offloadd.state.observed import DeviceView, InstanceState, ObservedState
from offloadd.units import Instant
from tests.unit.plan.build import ALPHA, BETA, NOW, Scene, ended, gib, offer, spec, view, waits

GPU = DeviceId(LOCAL, "GPU-a")
ELASTIC = VramEstimate(total=gib(4), basis="given", elastic=True)


def both(**fields: object) -> Scene:
    return Scene(spec("m", run=RunMode.ALWAYS, backends=(ALPHA, BETA), **fields))


def started(scene: Scene) -> list[tuple[str, str]]:
    return [(str(a.instance), a.candidate.backend) for a in scene.plan().actions if isinstance(a, StartInstance)]


def elsewhere() -> Candidate:
    return replace(offer(0, "there", backend=BETA), estimate=VramEstimate(total=gib(0), on_host=gib(0), basis="elsewhere"))


def test_the_first_engine_that_has_room_is_taken() -> None:
    assert started(both().offers("m", offer(4), offer(2, backend=BETA))) == [("m-1", ALPHA)]
    assert started(both().offers("m", offer(40), offer(2, backend=BETA))) == [("m-1", BETA)]


def test_what_runs_elsewhere_serves_when_nothing_else_can() -> None:
    assert started(both().offers("m", offer(40), elsewhere())) == [("m-1", BETA)]
    blind = both().offers("m", offer(4), elsewhere())
    blind.blind = True
    assert started(blind) == [("m-1", BETA)]


def test_an_engine_that_backs_off_lets_the_next_one_serve() -> None:
    failing = [ended(f"m-{number}", ago=1) for number in (1, 2, 3)]
    scene = both().offers("m", offer(4), elsewhere()).had(*failing)
    assert [backend for _, backend in started(scene)] == [BETA]


def with_cloud(scene: Scene, *views: object) -> Plan:
    """A machine with 16 GiB on which BETA is an engine elsewhere."""
    engines = {BETA: Engine(name=BETA, adapter="external", kind=BackendKind.EXTERNAL), ALPHA: Engine(name=ALPHA, adapter="a")}
    observed = ObservedState(
        instances={each.id: each for each in views},  # type: ignore[attr-defined]
        devices={HOST_RAM: DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=gib(16), free=gib(16))},
        candidates=scene.candidates,
        exits=scene.exits,
    )
    return plan(DesiredState(models=scene.models, engines=engines), observed, Demand(), now=NOW)


def cloud(name: str = "m-1", state: InstanceState = InstanceState.READY) -> object:
    spec_of_both = both().models[ModelName("m")]
    return view(name, 0, state, spec=spec_of_both, backend=BETA, fingerprint="there", placement=Placement(reserved={}), measured={})


def here(state: InstanceState) -> object:
    return view("m-2", 4, state, spec=both().models[ModelName("m")])


def acts(answer: Plan) -> list[str]:
    return [f"{type(action).__name__.removesuffix('Instance').lower()} {action.instance}" for action in answer.actions]  # type: ignore[union-attr]


def test_from_elsewhere_a_model_comes_home_when_there_is_room() -> None:
    scene = both().offers("m", offer(4), elsewhere())
    assert acts(with_cloud(scene, cloud())) == ["start m-2"]
    assert acts(with_cloud(both().offers("m", offer(40), elsewhere()), cloud())) == []
    # Not while it backs off, and not where what is elsewhere comes first.
    assert acts(with_cloud(scene.had(ended("m-0", 1), ended("m-0", 1), ended("m-0", 1)), cloud())) == []
    first = Scene(spec("m", run=RunMode.ALWAYS, backends=(BETA, ALPHA))).offers("m", elsewhere(), offer(4))
    assert acts(with_cloud(first, cloud())) == []


def test_what_is_elsewhere_serves_until_the_one_here_is_ready() -> None:
    scene = both().offers("m", offer(4), elsewhere())
    assert acts(with_cloud(scene, cloud(), here(InstanceState.LOADING))) == []
    answer = with_cloud(scene, cloud(), here(InstanceState.READY))
    assert acts(answer) == ["stop m-1"]
    assert "which comes first" in answer.actions[0].why  # type: ignore[union-attr]


# --- engines that requests name ---


def named(scene: Scene, *views: object, ago: float = 1.0, waits_for: bool = True) -> Plan:
    """The same machine, with a request that asks for BETA."""
    observed = ObservedState(
        instances={each.id: each for each in views},  # type: ignore[attr-defined]
        devices={HOST_RAM: DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=gib(16), free=gib(12))},
        candidates=scene.candidates,
    )
    m = ModelName("m")
    demand = Demand(
        waiting={m: waits(1)} if waits_for else {},
        named={m: {BETA: Instant(NOW - ago)}},
        waiting_for={m: frozenset({BETA})} if waits_for else {},
        last_used={m: Instant(NOW - ago)},
    )
    return plan(DesiredState(models=scene.models), observed, demand, now=NOW)


def test_an_engine_that_a_request_names_is_started_and_no_other_for_it() -> None:
    scene = Scene(spec("m", backends=(ALPHA, BETA))).offers("m", offer(4), offer(4, "b", backend=BETA))
    (start,) = named(scene).actions
    assert isinstance(start, StartInstance)
    assert start.candidate.backend == BETA


def test_it_is_started_beside_the_one_that_runs_and_both_stay_a_while() -> None:
    scene = Scene(spec("m", backends=(ALPHA, BETA))).offers("m", offer(2), offer(2, "b", backend=BETA))
    first = view("m-1", 2, spec=scene.models[ModelName("m")])
    assert acts(named(scene, first)) == ["start m-2"]
    second = view("m-2", 2, spec=scene.models[ModelName("m")], backend=BETA, fingerprint="b")
    assert acts(named(scene, first, second, waits_for=False)) == []
    pinned = Scene(spec("m", run=RunMode.ALWAYS, backends=(ALPHA, BETA))).offers("m", offer(2), offer(2, "b", backend=BETA))
    assert acts(named(pinned, first, second, waits_for=False, ago=601.0)) == ["stop m-2"]


# --- engines that measure their GPU load alone on it ---


def on_gpu(name: str, state: InstanceState, *, elastic: bool) -> object:
    placement = Placement(reserved={GPU: gib(4)}, gpus=(GPU,), elastic=elastic)
    return view(name, 4, state, placement=placement, measured={})


def planned(*views: object, estimates: dict[str, VramEstimate]) -> Plan:
    specs = {ModelName(name): spec(name, run=RunMode.ALWAYS) for name in estimates}
    gpu = DeviceView(id=GPU, kind=DeviceKind.NVIDIA, name="card", total=gib(24), free=gib(20))
    observed = ObservedState(
        instances={each.id: each for each in views},  # type: ignore[attr-defined]
        devices={GPU: gpu, HOST_RAM: DeviceView(id=HOST_RAM, kind=DeviceKind.HOST, name="RAM", total=gib(64), free=gib(60))},
        candidates={name: (replace(offer(4), estimate=estimates[name]),) for name in specs},
    )
    models = {**specs, **{each.spec.name: each.spec for each in views}}  # type: ignore[attr-defined]
    return plan(DesiredState(models=models), observed, Demand(), now=NOW)


def starts(answer: Plan) -> list[InstanceId]:
    return [action.instance for action in answer.actions if isinstance(action, StartInstance)]


def test_of_two_that_measure_one_starts_and_the_other_waits() -> None:
    answer = planned(estimates={"a": ELASTIC, "b": ELASTIC})
    assert [key.model for key in starts(answer)] == ["a"]
    assert "waits until a-1 has loaded" in answer.decisions[ModelName("b")].sentence


def test_nothing_loads_beside_one_that_measures_nor_that_one_beside_others() -> None:
    plain = VramEstimate(total=gib(4), basis="given")
    assert not starts(planned(on_gpu("x-1", InstanceState.LOADING, elastic=True), estimates={"a": plain}))
    assert not starts(planned(on_gpu("x-1", InstanceState.STARTING, elastic=False), estimates={"a": ELASTIC}))
    assert starts(planned(on_gpu("x-1", InstanceState.LOADING, elastic=False), estimates={"a": plain}))
    assert starts(planned(on_gpu("x-1", InstanceState.READY, elastic=True), estimates={"a": ELASTIC}))
