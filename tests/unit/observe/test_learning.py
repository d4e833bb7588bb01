"""Which measurements teach what a launch takes."""

from __future__ import annotations

import pytest

from offloadd.observe.learning import is_news, learned
from offloadd.state.ids import HOST_RAM, LOCAL, BackendName, DeviceId, ModelName
from offloadd.state.launch import Footprint, Placement
from offloadd.state.observed import InstanceView
from offloadd.units import Bytes, Instant, Seconds
from tests.unit.plan.build import gib, view

GPU, OTHER = DeviceId(LOCAL, "GPU-0"), DeviceId(LOCAL, "GPU-1")


def on_gpu(name: str = "a-1", taken: float = 9, **changes: object) -> InstanceView:
    """Ready for some time on one card, promised 10 GiB."""
    usual: dict[str, object] = {
        "placement": Placement(reserved={GPU: gib(10), HOST_RAM: gib(1)}, gpus=(GPU,)),
        "footprint_key": "key",
        "started_at": Instant(900.0),
        "ready_at": Instant(940.0),
        "measured": {GPU: gib(taken), HOST_RAM: gib(1)},
        "peak": {GPU: gib(taken), HOST_RAM: gib(1)},
    }
    return view(name, 10, **usual | changes)


def test_the_peak_on_the_card_and_the_time_to_load() -> None:
    known = Footprint(model=ModelName("a"), backend=BackendName("alpha"), peak=gib(9), load_seconds=Seconds(40.0))
    assert learned([on_gpu()]) == {"key": known}


def test_the_highest_of_several_replicas() -> None:
    found = learned([on_gpu("a-1", 8), on_gpu("a-2", 9), on_gpu("a-3", 7)])
    assert found["key"].peak == gib(9)


@pytest.mark.parametrize(
    "changes",
    [
        {"ready_at": None},
        {"footprint_key": ""},
        {"peak": {}},
        {"measured": {}},
        {"measured": {GPU: Bytes(0)}},
        {"placement": Placement(reserved={HOST_RAM: gib(10)})},
        {"placement": Placement(reserved={GPU: gib(5), OTHER: gib(5)}, gpus=(GPU, OTHER), split=(5, 6))},
        {"placement": Placement(reserved={GPU: gib(5), HOST_RAM: gib(5)}, gpus=(GPU,), split=(5,))},
    ],
)
def test_what_teaches_nothing(changes: dict[str, object]) -> None:
    assert learned([on_gpu(**changes)]) == {}


def test_news_is_what_is_clearly_more() -> None:
    known = Footprint(model=ModelName("a"), backend=BackendName("alpha"), peak=Bytes(1000))
    more, alike, less = (Footprint(model=known.model, backend=known.backend, peak=Bytes(peak)) for peak in (1011, 1009, 500))
    assert is_news(known, None)
    assert is_news(more, known)
    assert not is_news(alike, known)
    assert not is_news(less, known)
