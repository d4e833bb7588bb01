from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.observe.devices.amdgpu import AmdReader
from offloadd.observe.devices.host import HostReader
from offloadd.observe.devices.nvml import NvmlReader
from offloadd.observe.devices.ram import Ram
from offloadd.units import Instant
from tests.conformance.gpu_reader import ReaderConformance, Source
from tests.fakes.amdgpu import FakeAmd, client
from tests.fakes.nvml import fake
from tests.fakes.nvml.fake import GIB, FakeGpu


class Clock:
    """Leaps over every wait."""

    at = 0.0

    def now(self) -> Instant:
        return Instant(self.at)

    def wall(self) -> float:
        return self.at

    def leap(self) -> None:
        self.at += 3600


class Machine:
    """RAM that can be taken, and /proc that can be broken."""

    def __init__(self) -> None:
        self.free = 20 * GIB
        self.is_broken = False

    def __call__(self) -> Ram:
        if self.is_broken:
            raise OSError("/proc/meminfo cannot be read")
        return Ram(32 * GIB, self.free)

    def take(self, size: int) -> None:
        self.free -= size

    def break_down(self) -> None:
        self.is_broken = True

    def heal(self) -> None:
        self.is_broken = False


class TestHost(ReaderConformance):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        machine = Machine()
        reader = HostReader(cgroups=tmp_path, membership=tmp_path / "none", machine=machine)
        return Source(reader=reader, devices=1, take=machine.take, fail=machine.break_down, heal=machine.heal)


class TestHostInACgroup(ReaderConformance):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        machine = Machine()
        (tmp_path / "self").write_text("0::/\n")
        (tmp_path / "memory.max").write_text(f"{16 * GIB}\n")

        def use(size: int) -> None:
            (tmp_path / "memory.current").write_text(f"{4 * GIB + size}\n")

        use(0)
        reader = HostReader(cgroups=tmp_path, membership=tmp_path / "self", machine=machine)
        return Source(reader=reader, devices=1, take=use, fail=machine.break_down, heal=machine.heal)


class NvmlConformance(ReaderConformance):
    """Two cards, a slice with a process between them; subclasses choose the fault."""

    init_error = 0
    errors: dict[str, int] = {}  # noqa: RUF012
    card_errors: dict[str, int] = {}  # noqa: RUF012

    @pytest.fixture
    def source(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        nvml = fake.use(monkeypatch, tmp_path, gpus=3)
        nvml.gpus[0].compute = {4711: 2 * GIB, 4712: None}
        nvml.gpus[1].mig = 1
        nvml.gpus[1].slices = {
            slot: FakeGpu(uuid=f"MIG-{slot}", name="NVIDIA A100 MIG 1g.5gb", total=5 * GIB, utilization=None) for slot in (0, 4)
        }
        nvml.write()
        clock = Clock()
        reader = NvmlReader(clock=clock)

        def take(size: int) -> None:
            nvml.gpus[0].compute[4713] = size
            nvml.write()

        def put(init_error: int, errors: dict[str, int], card_errors: dict[str, int]) -> None:
            nvml.init_error, nvml.errors, nvml.gpus[2].errors = init_error, errors, card_errors
            nvml.write()
            clock.leap()

        yield Source(
            reader=reader,
            devices=4,
            take=take,
            fail=lambda: put(self.init_error, self.errors, self.card_errors),
            heal=lambda: put(0, {}, {}),
        )
        reader.close()


class TestNvmlWithoutDriver(NvmlConformance):
    init_error = 9
    errors = {"*": 9}  # noqa: RUF012


class TestNvmlOfAnotherVersion(NvmlConformance):
    init_error = 18
    errors = {"*": 18}  # noqa: RUF012


class TestNvmlInTrouble(NvmlConformance):
    errors = {"*": 999}  # noqa: RUF012


class TestNvmlWithALostCard(NvmlConformance):
    card_errors = {"*": 15}  # noqa: RUF012


class TestNvmlWithACardThatHasNoHandle(NvmlConformance):
    card_errors = {"nvmlDeviceGetHandleByIndex_v2": 15}  # noqa: RUF012

    def test_it_can_start_while_all_is_broken(self, source: Source) -> None:
        """Nothing but the index of the card is known then."""
        source.fail()
        assert len(source.reader.read()) == 3
        assert list(source.reader.problems) == ["gpu2"]
        source.heal()
        assert len(source.reader.read()) == 4


class TestAmd(ReaderConformance):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        amd = FakeAmd(tmp_path)
        first = amd.card(0, "0000:03:00.0", used=GIB, unique_id="8a1f0c3d2b4e5f60")
        second = amd.card(2, "0000:0a:00.0")
        amd.descriptor(4711, 5, client(first.address, 1, drm_memory_vram="1024 KiB"))
        return Source(
            reader=AmdReader(drm=amd.drm, proc=amd.proc),
            devices=2,
            take=lambda size: first.put(mem_info_vram_used=GIB + size),
            fail=lambda: second.put(mem_info_vram_used="?"),
            heal=lambda: second.put(mem_info_vram_used=GIB),
        )
