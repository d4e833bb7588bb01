"""The fake's calls that no reader makes yet, through the real nvidia-ml-py."""

from __future__ import annotations

from collections.abc import Iterator

import pynvml
import pytest

from tests.fakes.nvml.fake import FakeNvml


@pytest.fixture
def session(nvml: FakeNvml) -> Iterator[FakeNvml]:
    pynvml.nvmlInit()
    yield nvml
    pynvml.nvmlShutdown()


def test_handles(session):
    card = pynvml.nvmlDeviceGetHandleByUUID(session.gpus[1].uuid)
    assert pynvml.nvmlDeviceGetIndex(card) == 1
    assert pynvml.nvmlDeviceGetMinorNumber(card) == 1
    pci = pynvml.nvmlDeviceGetPciInfo(card)
    assert (pci.busId, pci.busIdLegacy, pci.bus) == ("00000000:02:00.0", "0000:02:00.0", 2)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-none")
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetHandleByIndex(9)


def test_before_the_session(nvml):
    with pytest.raises(pynvml.NVMLError) as caught:
        pynvml.nvmlDeviceGetCount()
    assert caught.value.value == 1


def test_an_event_is_told_once(session):
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(card, pynvml.nvmlDeviceGetSupportedEventTypes(card), events)
    session.gpus[0].xid = (1, 79)
    session.write()
    event = pynvml.nvmlEventSetWait_v2(events, 1000)
    assert (event.eventType, event.eventData) == (pynvml.nvmlEventTypeXidCriticalError, 79)
    with pytest.raises(pynvml.NVMLError_Timeout):
        pynvml.nvmlEventSetWait_v2(events, 20)
    pynvml.nvmlEventSetFree(events)
