"""What any reader of devices must do. One suite, run on every reader; a subclass provides the fixture `source`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offloadd.errors import TemporaryError
from offloadd.observe.devices import DeviceReader
from offloadd.state.ids import LOCAL
from offloadd.state.observed import DeviceView


@dataclass(frozen=True, kw_only=True)
class Source:
    """A reader, and what its machine can be made to do."""

    reader: DeviceReader
    devices: int
    """How many it has while all is well."""
    take: Callable[[int], None]
    """Let something use so many bytes more of the first device."""
    fail: Callable[[], None]
    """Break what is read, wholly or one device of it."""
    heal: Callable[[], None]
    """Undo `fail`, and let the time pass after which the reader looks again."""


def figures(views: Sequence[DeviceView]) -> list[tuple[str, str, int, int]]:
    """What does not change while nothing happens; the rest are gauges."""
    return [(str(view.id), view.name, view.index, view.total) for view in views]


class ReaderConformance:
    def test_it_has_a_name(self, source: Source) -> None:
        assert source.reader.name

    def test_all_is_well(self, source: Source) -> None:
        assert len(source.reader.read()) == source.devices
        assert source.reader.problems == {}

    def test_ids_are_unique_and_of_this_host(self, source: Source) -> None:
        ids = [view.id for view in source.reader.read()]
        assert len(set(ids)) == len(ids)
        assert all(each.name and each.host == LOCAL for each in ids)

    def test_readings_are_alike_while_nothing_happens(self, source: Source) -> None:
        first = figures(source.reader.read())
        assert all(figures(source.reader.read()) == first for _ in range(20))

    def test_bytes_are_sane(self, source: Source) -> None:
        for view in source.reader.read():
            assert 0 <= view.free <= view.total
            assert view.total > 0
            assert view.used + view.free == view.total

    def test_devices_are_in_the_order_of_their_indexes(self, source: Source) -> None:
        views = source.reader.read()
        assert [view.index for view in views] == sorted(view.index for view in views)
        whole = [view.index for view in views if not view.slice_of]
        assert len(set(whole)) == len(whole)
        assert all(index >= 0 for index in whole)

    def test_gauges_are_in_range_or_unknown(self, source: Source) -> None:
        for view in source.reader.read():
            assert view.name
            assert view.utilization is None or 0 <= view.utilization <= 1
            assert view.temperature is None or -50 < view.temperature < 150
            assert view.power_w is None or 0 <= view.power_w < 5000

    def test_processes_are_pids_with_sizes_or_unknown(self, source: Source) -> None:
        for view in source.reader.read():
            for pid, size in (view.processes or {}).items():
                assert pid > 0
                assert size is None or size >= 0

    def test_what_is_taken_is_no_longer_free(self, source: Source) -> None:
        before = source.reader.read()[0]
        source.take(2**30)
        after = source.reader.read()[0]
        assert (after.id, after.total) == (before.id, before.total)
        assert before.free - after.free == 2**30

    def test_a_reading_is_of_its_instant(self, source: Source) -> None:
        views = source.reader.read()
        before = [(view.free, dict(view.processes or {})) for view in views]
        source.take(2**30)
        source.reader.read()
        assert [(view.free, dict(view.processes or {})) for view in views] == before

    def test_it_can_be_read_from_another_thread(self, source: Source) -> None:
        expected = figures(source.reader.read())
        found: list[list[tuple[str, str, int, int]]] = []
        thread = threading.Thread(target=lambda: found.append(figures(source.reader.read())))
        thread.start()
        thread.join(10)
        assert found == [expected]

    def test_a_failure_is_a_known_error_or_a_device_left_out(self, source: Source) -> None:
        expected = figures(source.reader.read())
        source.fail()
        for _ in range(3):
            try:
                views = source.reader.read()
            except (OSError, TemporaryError):
                continue
            assert len(views) < len(expected)
            assert set(figures(views)) < set(expected)
            missing = {row[0] for row in expected} - {str(view.id) for view in views}
            assert source.reader.problems.keys() >= missing
            assert all(source.reader.problems.values())

    def test_it_recovers(self, source: Source) -> None:
        expected = figures(source.reader.read())
        source.fail()
        try:
            source.reader.read()
        except (OSError, TemporaryError):
            pass
        source.heal()
        assert figures(source.reader.read()) == expected
        assert source.reader.problems == {}

    def test_it_can_start_while_all_is_broken(self, source: Source) -> None:
        source.fail()
        try:
            assert len(source.reader.read()) < source.devices
        except (OSError, TemporaryError):
            pass
        source.heal()
        assert len(source.reader.read()) == source.devices
