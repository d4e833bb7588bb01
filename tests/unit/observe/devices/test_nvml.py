from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from offloadd.errors import TemporaryError
from offloadd.observe.devices import held_by
from offloadd.observe.devices.nvml import NO_DRIVER_WAIT, NvmlReader
from offloadd.observe.devices.ram import Ram
from offloadd.state.ids import DeviceKind
from tests.fakes.nvml import fake
from tests.fakes.nvml.fake import GIB, FakeGpu, FakeNvml

MIB = 2**20
MEMORY_V1 = "nvmlDeviceGetMemoryInfo"
MEMORY_V2 = "nvmlDeviceGetMemoryInfo_v2"
COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"
GRAPHICS = "nvmlDeviceGetGraphicsRunningProcesses_v3"
HANDLE = "nvmlDeviceGetHandleByIndex_v2"
GONE = {"*": 15}


@pytest.fixture
def reader(nvml: FakeNvml, clock) -> Iterator[NvmlReader]:
    reader = NvmlReader(clock=clock, machine=lambda: Ram(128 * GIB, 100 * GIB))
    yield reader
    nvml.sleeps = {}
    nvml.write()
    reader.close()


def change(nvml: FakeNvml, **facts: object) -> None:
    for name, value in facts.items():
        setattr(nvml, name, value)
    nvml.write()


def change_gpu(nvml: FakeNvml, index: int, **facts: object) -> FakeGpu:
    for name, value in facts.items():
        setattr(nvml.gpus[index], name, value)
    nvml.write()
    return nvml.gpus[index]


def until(check: Callable[[], bool], within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What a card shows


def test_a_card_is_read_whole(nvml, reader):
    change_gpu(nvml, 1, used=3 * GIB, utilization=83, temperature=61, power=287_500, name="NVIDIA L40S")
    first, second = reader.read()
    assert [str(first.id), str(second.id)] == [gpu.uuid for gpu in nvml.gpus]
    assert (first.index, second.index) == (0, 1)
    assert (second.kind, second.name, second.total) == (DeviceKind.NVIDIA, "NVIDIA L40S", 24 * GIB)
    assert (second.utilization, second.temperature, second.power_w) == (0.83, 61, 287.5)
    assert (second.processes, second.unified, second.slice_of, second.problem) == ({}, False, "", "")
    assert reader.problems == {}


def test_what_the_driver_keeps_for_itself_is_not_free(nvml, reader):
    change_gpu(nvml, 0, reserved=700 * MIB, used=GIB)
    assert reader.read()[0].free == 24 * GIB - GIB - 700 * MIB


@pytest.mark.parametrize("code", [3, 13, 25])
def test_an_older_driver_has_only_the_first_memory_call(nvml, reader, code):
    change_gpu(nvml, 0, errors={MEMORY_V2: code}, used=GIB)
    first, _ = reader.read()
    assert (first.total, first.free) == (24 * GIB, 24 * GIB - GIB - GIB // 2)
    assert not first.unified


def test_gauges_that_are_not_offered_are_unknown(nvml, reader):
    change_gpu(nvml, 0, utilization=None, temperature=None, power=None)
    first, _ = reader.read()
    assert (first.utilization, first.temperature, first.power_w) == (None, None, None)
    assert reader.problems == {}


@pytest.mark.parametrize("code", [2, 3, 4, 999])
def test_an_error_of_a_gauge_costs_only_the_gauge(nvml, reader, code):
    calls = ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetName", GRAPHICS]
    change_gpu(nvml, 0, errors=dict.fromkeys(calls, code))
    first, _ = reader.read()
    assert (first.utilization, first.power_w, first.name, first.temperature) == (None, None, "NVIDIA GPU", 40)


def test_a_name_that_is_not_text_is_unknown(nvml, reader):
    change_gpu(nvml, 0, name="RTX \udcff\udcfe")
    assert reader.read()[0].name == "NVIDIA GPU"


def test_the_temperature_is_had_by_the_newer_call_too(nvml, reader):
    change_gpu(nvml, 0, errors={"nvmlDeviceGetTemperature": 13}, temperature=47)
    assert reader.read()[0].temperature == 47


def test_a_card_without_memory_information_uses_the_machines(nvml, reader):
    change_gpu(nvml, 0, errors={MEMORY_V1: 3, MEMORY_V2: 3}, compute={77: GIB}, name="NVIDIA GB10")
    first, second = reader.read()
    assert (first.total, first.free, first.unified) == (128 * GIB, 100 * GIB, True)
    assert first.processes == {77: GIB}
    assert not second.unified


def test_a_card_that_says_it_has_no_memory_is_left_out(nvml, reader):
    change_gpu(nvml, 0, total=0, reserved=0)
    assert [view.index for view in reader.read()] == [1]
    assert "no memory" in reader.problems[nvml.gpus[0].uuid]


def test_versions_of_the_session(nvml, reader):
    assert reader.versions == {}
    reader.read()
    assert reader.versions == {"driver": "580.95.05", "nvml": "13.580.95.05", "cuda": "13.0"}


# Processes


def test_both_lists_are_read_and_a_process_in_both_counts_once(nvml, reader):
    change_gpu(nvml, 0, compute={10: 2 * GIB, 11: GIB}, graphics={10: 2 * GIB, 12: 300 * MIB})
    first, _ = reader.read()
    assert first.processes == {10: 2 * GIB, 11: GIB, 12: 300 * MIB}
    assert first.used == 3 * GIB + 300 * MIB + GIB // 2


def test_a_size_that_the_driver_does_not_tell_is_unknown(nvml, reader):
    change_gpu(nvml, 0, compute={10: None, 11: GIB})
    first, second = reader.read()
    assert first.processes == {10: None, 11: GIB}
    assert held_by(first, [11]) == GIB
    assert held_by(first, [10, 11]) is None
    assert held_by(second, [10, 11]) == 0


def test_more_processes_than_were_first_asked_for(nvml, reader):
    change_gpu(nvml, 0, compute=dict.fromkeys(range(1, 41), MIB))
    assert len(reader.read()[0].processes) == 40


def test_processes_of_a_driver_without_the_third_version_of_the_list(nvml, reader):
    change_gpu(nvml, 0, errors={COMPUTE: 13, GRAPHICS: 13}, compute={10: GIB}, graphics={12: MIB})
    assert reader.read()[0].processes == {10: GIB, 12: MIB}


def test_processes_that_cannot_be_listed_are_unknown_and_the_memory_is_not(nvml, reader):
    change_gpu(nvml, 0, errors={COMPUTE: 4}, compute={10: GIB})
    first, _ = reader.read()
    assert first.processes is None
    assert held_by(first, [10]) is None
    assert first.problem == "what each process holds is not known: Insufficient Permissions"
    assert first.used == GIB + GIB // 2


def test_memory_of_a_process_that_ended_counts_until_it_is_released(nvml, reader):
    change_gpu(nvml, 0, late=[(5 * GIB, time.monotonic() + 0.4)])
    first, _ = reader.read()
    assert (first.used, first.processes) == (5 * GIB + GIB // 2, {})
    until(lambda: reader.read()[0].used == GIB // 2)


def test_a_living_process_holds_what_it_registered_and_releases_it_late(nvml, reader):
    change(nvml, release_lag_ms=400)
    process = subprocess.Popen(["sleep", "60"])
    try:
        nvml.register(process.pid, {"0": GIB, nvml.gpus[1].uuid: 2 * GIB})
        first, second = reader.read()
        assert (held_by(first, [process.pid]), held_by(second, [process.pid])) == (GIB, 2 * GIB)
        assert second.used == 2 * GIB + GIB // 2
    finally:
        process.kill()
    until(lambda: reader.read()[1].processes == {})  # also while it is a zombie
    assert reader.read()[1].used == 2 * GIB + GIB // 2
    process.wait()
    until(lambda: reader.read()[1].used == GIB // 2)


def test_a_list_that_outgrows_the_room_for_it_every_time_is_unknown(nvml, reader):
    change_gpu(nvml, 0, errors={COMPUTE: 7}, compute={10: GIB})
    first, _ = reader.read()
    assert (first.processes, first.used) == (None, GIB + GIB // 2)
    assert nvml.count(COMPUTE) == 5  # twice the two calls of one question, and card 1


# MIG


def slice_of(gpu: FakeGpu, number: int, **facts: object) -> FakeGpu:
    name = f"{gpu.name} MIG 1g.5gb"
    return FakeGpu(uuid=f"MIG-{number:08x}", name=name, total=5 * GIB, reserved=0, **{"utilization": None, "power": None} | facts)


@pytest.fixture
def sliced(nvml: FakeNvml) -> FakeGpu:
    card = nvml.gpus[0]
    card.name = "NVIDIA A100-SXM4-40GB"
    card.mig = 1
    card.slices = {0: slice_of(card, 1, compute={10: GIB}, utilization=50), 3: slice_of(card, 2)}
    card.errors = {MEMORY_V1: 4, MEMORY_V2: 4}  # the card's own values need privileges then
    nvml.write()
    return card


def test_slices_are_devices_in_place_of_their_card(nvml, sliced, reader):
    one, two, other = reader.read()
    assert [str(view.id) for view in (one, two, other)] == ["MIG-00000001", "MIG-00000002", nvml.gpus[1].uuid]
    assert [view.index for view in (one, two, other)] == [0, 0, 1]
    assert [view.slice_of for view in (one, two, other)] == [sliced.uuid, sliced.uuid, ""]
    assert (one.total, one.free, one.processes) == (5 * GIB, 4 * GIB, {10: GIB})
    assert (one.name, one.utilization, one.power_w) == ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None)
    assert reader.problems == {}


def test_a_slice_that_cannot_be_read_leaves_the_others(nvml, sliced, reader):
    sliced.slices[0].errors = {MEMORY_V1: 3, MEMORY_V2: 3}
    nvml.write()
    assert [str(view.id) for view in reader.read()] == ["MIG-00000002", nvml.gpus[1].uuid]
    assert reader.problems == {"MIG-00000001": "NVIDIA A100-SXM4-40GB MIG 1g.5gb (gpu0): Not Supported"}


def test_a_lost_card_takes_all_its_slices_with_it(nvml, sliced, reader):
    sliced.slices[3].errors = GONE
    nvml.write()
    assert [str(view.id) for view in reader.read()] == [nvml.gpus[1].uuid]
    assert list(reader.problems) == [sliced.uuid]


def test_mig_mode_without_slices_is_a_problem(nvml, sliced, reader):
    sliced.slices = {}
    nvml.write()
    assert [view.index for view in reader.read()] == [1]
    assert "no MIG devices" in reader.problems[sliced.uuid]


def test_slices_that_were_made_anew_are_not_missed(nvml, sliced, reader, clock):
    reader.read()
    sliced.slices = {1: slice_of(sliced, 9)}
    nvml.write()
    assert [str(view.id) for view in reader.read()] == ["MIG-00000009", nvml.gpus[1].uuid]
    assert reader.problems == {}


def test_mig_that_is_off_changes_nothing(nvml, reader):
    change_gpu(nvml, 0, mig=0)
    assert [view.slice_of for view in reader.read()] == ["", ""]


# Cards that are lost


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (GONE, "GPU is lost"),
        ({"*": 16}, "GPU requires restart"),
        ({"*": 999}, "Unknown Error"),
        ({HANDLE: 15}, "GPU is lost"),
        ({MEMORY_V2: 999}, "Unknown Error"),
        ({MEMORY_V2: 10}, "Timeout"),
        ({COMPUTE: 15}, "GPU is lost"),
        ({"nvmlDeviceGetTemperature": 16}, "GPU requires restart"),
    ],
)
def test_a_lost_card_is_absent_and_named(nvml, reader, errors, said):
    assert len(reader.read()) == 2
    gpu = change_gpu(nvml, 1, errors=errors)
    assert [view.index for view in reader.read()] == [0]
    assert reader.problems[gpu.uuid].startswith(f"NVIDIA GeForce RTX 4090 (gpu1): {said}")


def test_a_card_lost_before_it_was_ever_read_is_named_by_its_index(nvml, reader):
    change_gpu(nvml, 0, errors={HANDLE: 15})
    assert [view.index for view in reader.read()] == [1]
    assert list(reader.problems) == ["gpu0"]


def test_a_card_that_is_no_longer_listed_is_missed(nvml, reader):
    reader.read()
    lost = nvml.gpus.pop(0)
    nvml.write()
    for _ in range(3):
        assert [(str(view.id), view.index) for view in reader.read()] == [(nvml.gpus[0].uuid, 0)]
        assert reader.problems == {lost.uuid: "NVIDIA GeForce RTX 4090 (gpu0) is no longer listed by the driver"}


def test_a_card_that_was_reset_is_found_by_a_new_session(nvml, reader, clock):
    reader.read()
    gpu = change_gpu(nvml, 1, errors=GONE)
    reader.read()
    opened = nvml.count("nvmlInitWithFlags")
    clock.at += 14
    reader.read()
    assert nvml.count("nvmlInitWithFlags") == opened
    clock.at += 2
    reader.read()
    assert nvml.count("nvmlInitWithFlags") == opened + 1
    clock.at += 16  # the second wait is longer
    reader.read()
    assert nvml.count("nvmlInitWithFlags") == opened + 1
    gpu.errors = {}
    nvml.write()
    assert len(reader.read()) == 2
    assert reader.problems == {}


# The driver


def test_the_session_is_kept_open(nvml, reader):
    for _ in range(5):
        reader.read()
    assert (nvml.count("nvmlInitWithFlags"), nvml.count("nvmlShutdown")) == (1, 0)


def test_no_driver_library_means_no_devices_and_no_word(nvml, reader, clock):
    change(nvml, init_error=12)
    for _ in range(3):
        assert reader.read() == ()
    assert nvml.count("nvmlInitWithFlags") == 1
    assert reader.problems == {}
    change(nvml, init_error=0)  # installed meanwhile
    assert reader.read() == ()
    clock.at += NO_DRIVER_WAIT
    assert len(reader.read()) == 2


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        (9, "Driver Not Loaded", "modprobe"),
        (18, "RM has detected an NVML/RM version mismatch", "reboot"),
        (4, "Insufficient Permissions", ""),
        (999, "Unknown Error", ""),
        (777, "NVML Error with code 777|Error 777", ""),
    ],
)
def test_a_driver_that_does_not_answer_is_an_error_and_is_asked_less_and_less(nvml, reader, clock, code, said, hint):
    change(nvml, init_error=code)
    attempts = []
    for _ in range(130):
        with pytest.raises(TemporaryError, match=said) as caught:
            reader.read()
        assert hint in caught.value.hint
        attempts.append(nvml.count("nvmlInitWithFlags"))
        clock.at += 1
    seconds = [second for second, count in enumerate(attempts) if count > ([0, *attempts])[second]]
    assert seconds == [0, 1, 3, 7, 15, 31, 63, 123]


@pytest.mark.parametrize("code", [1, 9, 18, 999])
def test_a_driver_that_goes_away_and_comes_back(nvml, reader, clock, code):
    before = reader.read()
    change(nvml, errors={"*": code}, init_error=9)
    for _ in range(3):
        with pytest.raises(TemporaryError, match="NVIDIA driver: "):
            reader.read()
        clock.at += 5
    assert reader.versions == {}
    change(nvml, errors={}, init_error=0, epoch=1)
    clock.at += 60
    assert reader.read() == before
    assert reader.problems == {}


@pytest.mark.parametrize("code", [1, 9, 18])
def test_a_driver_that_goes_away_between_two_calls_of_a_reading(nvml, reader, clock, code):
    reader.read()
    change_gpu(nvml, 1, errors={MEMORY_V2: code})
    with pytest.raises(TemporaryError):
        reader.read()
    assert nvml.count("nvmlShutdown") == 1


def test_a_driver_that_goes_away_while_slices_are_read(nvml, sliced, reader):
    sliced.slices[3].errors = {MEMORY_V2: 9}
    nvml.write()
    with pytest.raises(TemporaryError):
        reader.read()


def test_a_driver_that_goes_away_as_soon_as_the_session_is_open(nvml, reader, clock):
    change(nvml, errors={"nvmlSystemGetDriverVersion": 9})
    with pytest.raises(TemporaryError, match="Driver Not Loaded"):
        reader.read()
    assert nvml.count("nvmlShutdown") == 1
    change(nvml, errors={})
    clock.at += 1
    assert len(reader.read()) == 2


def test_a_session_that_opens_and_answers_nothing_is_not_opened_at_every_reading(nvml, reader, clock):
    change(nvml, errors={"nvmlDeviceGetCount_v2": 999})
    for _ in range(16):
        with pytest.raises(TemporaryError):
            reader.read()
        clock.at += 1
    assert nvml.count("nvmlInitWithFlags") == 5  # at 0, 1, 3, 7 and 15 s


def test_a_driver_that_was_loaded_anew_is_reached_by_a_new_session(nvml, reader, clock):
    before = reader.read()
    change(nvml, epoch=1)
    with pytest.raises(TemporaryError) as caught:
        reader.read()
    clock.at += caught.value.retry_after
    assert reader.read() == before
    assert nvml.count("nvmlInitWithFlags") == 2


def test_each_loss_of_the_driver_begins_with_short_waits(nvml, reader, clock):
    for loss in range(3):
        change(nvml, errors={"*": 9}, epoch=loss)
        for _ in range(2):
            with pytest.raises(TemporaryError):
                reader.read()
        with pytest.raises(TemporaryError) as caught:
            reader.read()
        assert caught.value.retry_after == 1
        change(nvml, errors={})
        clock.at += 1
        assert len(reader.read()) == 2


def test_without_a_driver_no_single_card_is_to_blame(nvml, reader):
    change_gpu(nvml, 1, errors=GONE)
    reader.read()
    assert list(reader.problems) == ["gpu1"]
    change(nvml, errors={"*": 9})
    with pytest.raises(TemporaryError):
        reader.read()
    assert reader.problems == {}


def test_closing_twice_and_reading_after_it(nvml, reader):
    reader.close()
    reader.read()
    reader.close()
    reader.close()
    assert nvml.count("nvmlShutdown") == 1
    assert len(reader.read()) == 2


@pytest.mark.parametrize("call", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", MEMORY_V2, COMPUTE])
async def test_a_hang_is_over_when_the_driver_answers(nvml, reader, call):
    change(nvml, sleeps={call: 30})
    reading = asyncio.ensure_future(asyncio.to_thread(reader.read))
    await asyncio.to_thread(nvml.until_called, call)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(reading)
    change(nvml, sleeps={})
    assert len(await reading) == 2
    assert len(reader.read()) == 2


# The library found by its name, as a daemon finds it


def test_another_process_finds_the_library_by_name(nvml):
    script = "from offloadd.observe.devices.nvml import NvmlReader; print(len(NvmlReader().read()))"
    environment = nvml.environment | {"LD_LIBRARY_PATH": str(fake.build().parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_machine_without_the_library(nvml, monkeypatch, clock):
    monkeypatch.delenv("FAKE_NVML_STATE")
    assert NvmlReader(clock=clock).read() == ()


def test_importing_the_reader_does_not_import_nvidia_ml_py():
    script = "import sys, offloadd.observe.devices.nvml; print('pynvml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "False\n"
