from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.observe.devices import held_by
from offloadd.observe.devices.amdgpu import AmdReader
from offloadd.observe.devices.ram import Ram
from offloadd.state.ids import DeviceKind
from tests.fakes.amdgpu import GIB, FakeAmd, client

FIRST = "0000:03:00.0"
SECOND = "0000:0a:00.0"
MIB = 2**20


@pytest.fixture
def amd(tmp_path: Path) -> FakeAmd:
    return FakeAmd(tmp_path)


@pytest.fixture
def reader(amd: FakeAmd) -> AmdReader:
    return AmdReader(drm=amd.drm, proc=amd.proc, machine=lambda: Ram(64 * GIB, 30 * GIB))


def test_a_card_is_read_whole(amd, reader):
    card = amd.card(1, FIRST, total=24 * GIB, used=3 * GIB, unique_id="8a1f0c3d2b4e5f60")
    card.put(product_name="Radeon PRO W7900")
    (view,) = reader.read()
    assert (str(view.id), view.index, view.kind, view.name) == ("GPU-8a1f0c3d2b4e5f60", 0, DeviceKind.AMD, "Radeon PRO W7900")
    assert (view.total, view.free, view.unified) == (24 * GIB, 21 * GIB, False)
    assert (view.utilization, view.temperature, view.power_w) == (0.37, 51, 120.5)
    assert reader.problems == {}


def test_cards_are_in_the_order_of_their_numbers_and_others_are_passed_over(amd, reader):
    amd.card(10, SECOND)
    amd.card(2, FIRST)
    intel = amd.card(0, "0000:00:02.0")
    intel.put(mem_info_vram_total=None)
    (amd.drm / "version").write_text("drm 1.1.0 20060810\n")
    assert [(str(view.id), view.index) for view in reader.read()] == [(f"pci-{FIRST}", 0), (f"pci-{SECOND}", 1)]


@pytest.mark.parametrize("unique_id", [None, "", "0", "0x0", "0000000000000000"])
def test_a_card_without_a_number_of_its_own_goes_by_its_address(amd, reader, unique_id):
    amd.card(0, FIRST, unique_id=unique_id)
    assert str(reader.read()[0].id) == f"pci-{FIRST}"


def test_two_parts_of_one_chip_have_ids_of_their_own(amd, reader):
    amd.card(0, FIRST, unique_id="8a1f")
    amd.card(1, SECOND, unique_id="8a1f")
    assert [str(view.id) for view in reader.read()] == ["GPU-8a1f", f"pci-{SECOND}"]


def test_gauges_that_are_missing_or_refused_are_unknown(amd, reader):
    card = amd.card(0, FIRST)
    card.put(gpu_busy_percent="")
    card.gauge(temp1_input=None, power1_average=None)
    (view,) = reader.read()
    assert (view.utilization, view.temperature, view.power_w) == (None, None, None)
    card.gauge(power1_input=95_000_000)
    assert reader.read()[0].power_w == 95


def test_a_processors_graphics_have_what_the_machine_can_give(amd, reader):
    card = amd.card(0, FIRST, total=GIB // 2, used=GIB // 4)
    card.put(mem_info_gtt_total=60 * GIB, mem_info_gtt_used=2 * GIB)
    (view,) = reader.read()
    assert (view.total, view.free, view.unified) == (60 * GIB + GIB // 2, 30 * GIB + GIB // 4, True)


def test_a_card_does_not_count_memory_of_the_machine(amd, reader):
    amd.card(0, FIRST, total=8 * GIB).put(mem_info_gtt_total=60 * GIB, mem_info_gtt_used=0)
    (view,) = reader.read()
    assert (view.total, view.unified) == (8 * GIB, False)


@pytest.mark.parametrize("broken", [None, "", "many", "0"])
def test_a_card_that_cannot_be_read_is_absent_and_named(amd, reader, broken):
    amd.card(0, FIRST).put(mem_info_vram_used=None)
    amd.card(1, SECOND).put(mem_info_vram_total="" if broken is None else broken)
    amd.card(2, "0000:10:00.0")
    assert [(str(view.id), view.index) for view in reader.read()] == [("pci-0000:10:00.0", 2)]
    assert list(reader.problems) == [f"pci-{FIRST}", f"pci-{SECOND}"]
    assert FIRST in reader.problems[f"pci-{FIRST}"]


def test_a_card_that_fell_off_the_bus_is_missed_until_it_is_back(amd, reader):
    amd.card(0, FIRST)
    amd.card(1, SECOND)
    reader.read()
    amd.remove(0)
    assert [str(view.id) for view in reader.read()] == [f"pci-{SECOND}"]
    assert reader.problems == {f"pci-{FIRST}": f"AMD GPU at {FIRST} is no longer there"}
    (amd.drm / "card0").mkdir()
    (amd.drm / "card0" / "device").symlink_to(amd.drm.parents[1] / "devices" / FIRST)
    assert len(reader.read()) == 2
    assert reader.problems == {}


def test_a_machine_without_graphics(amd, tmp_path):
    assert AmdReader(drm=amd.drm, proc=amd.proc).read() == ()
    assert AmdReader(drm=tmp_path / "none", proc=amd.proc).read() == ()


def test_processes_by_card(amd, reader):
    amd.card(0, FIRST)
    amd.card(1, SECOND)
    amd.descriptor(10, 5, client(FIRST, 1, drm_memory_vram="2097152 KiB"))
    amd.descriptor(10, 6, client(SECOND, 2, drm_memory_vram="512 MiB"))
    amd.descriptor(11, 5, client(FIRST, 3, drm_resident_vram="4096"))
    first, second = reader.read()
    assert first.processes == {10: 2 * GIB, 11: 4096}
    assert second.processes == {10: 512 * MIB}
    assert held_by(first, [10, 11]) == 2 * GIB + 4096


def test_a_client_counts_once_however_many_descriptors_it_has(amd, reader):
    amd.card(0, FIRST)
    one = client(FIRST, 1, drm_memory_vram="1 GiB")
    amd.descriptor(9, 5, one)
    amd.descriptor(9, 6, one)
    amd.descriptor(9, 7, client(FIRST, 2, drm_memory_vram="2 GiB"))
    amd.descriptor(100, 5, one)
    assert reader.read()[0].processes == {9: 3 * GIB}


def test_the_newer_name_of_the_figure_goes_first(amd, reader):
    amd.card(0, FIRST)
    amd.descriptor(9, 5, client(FIRST, 1, drm_memory_vram="1 GiB", drm_resident_vram="2 GiB", drm_total_vram="3 GiB"))
    assert reader.read()[0].processes == {9: 2 * GIB}


def test_a_client_whose_size_is_not_told_is_unknown(amd, reader):
    amd.card(0, FIRST)
    amd.descriptor(9, 5, client(FIRST, 1, drm_memory_vram="1 GiB"))
    amd.descriptor(9, 6, client(FIRST, 2))
    amd.descriptor(10, 6, client(FIRST, 3, drm_memory_vram="lots"))
    (view,) = reader.read()
    assert view.processes == {9: None, 10: None}
    assert held_by(view, [9]) is None


def test_other_descriptors_are_not_looked_at(amd, reader):
    amd.card(0, FIRST)
    facts = client(FIRST, 1, drm_memory_vram="1 GiB")
    amd.descriptor(9, 5, facts, path="/tmp/file")
    amd.descriptor(9, 6, facts | {"drm-driver": "i915"})
    amd.descriptor(9, 7, facts)
    (amd.proc / "9" / "fdinfo" / "7").unlink()  # closed meanwhile
    (amd.proc / "self").mkdir()
    (amd.proc / "12").mkdir()  # ended, or another user's
    assert reader.read()[0].processes == {}
