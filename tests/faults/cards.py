"""GPUs whose driver is lost, whose memory comes back late, or is taken by somebody else: cards of a fake libnvidia-ml.so.1."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from tests.conformance.servers import until
from tests.fakes.nvml import fake
from tests.fakes.nvml.fake import FakeNvml
from tests.faults.table import Outcome, Place, Skipped, answers_again, fault
from tests.integration.gpu import GIB, card, gpu_model, running_on
from tests.integration.test_gpu_faults import QUICK, change, gpus

CARDS = {**QUICK, "offloadd.rounds.REFRESH": 0.2}


@contextlib.contextmanager
def two_cards(place: Place) -> Iterator[FakeNvml]:
    """Two cards of 24 GiB, which answer again at the end."""
    if not fake.compiler():
        raise Skipped("no C compiler for the fake libnvidia-ml.so.1")
    nvml = FakeNvml(place.folder, 2)
    try:
        yield nvml
    finally:
        change(nvml, sleeps={}, init_error=0)


@fault(41, "the NVIDIA driver is lost under a running model")
def driver_lost(place: Place) -> Outcome:
    with two_cards(place) as nvml, running_on(nvml, place.folder, {"a": gpu_model(10), "b": gpu_model(6)}, patches=CARDS) as daemon:
        assert daemon.chat("a").status == 200
        pid = daemon.pid("a")
        change(nvml, epoch=1, init_error=9)
        until(lambda: gpus(daemon) == [], "cards that cannot be read have no books")
        assert daemon.chat("a").status == 200
        asked = daemon.chat_soon("b")
        until(lambda: "cannot be read" in daemon.look("b")["reason"], "the other waits")
        since = time.monotonic()
        change(nvml, init_error=0)
        assert asked.result(30).status == 200
        recovery = time.monotonic() - since
        assert daemon.pid("a") == pid
        return Outcome("the loaded model 200 all along; a new one waits, and starts when the cards can be read", recovery)


@fault(42, "memory of an ended model comes back one second late")
def memory_late(place: Place) -> Outcome:
    with two_cards(place) as nvml:
        change(nvml, release_lag_ms=1000)
        models = {"first": gpu_model(14, devices=[0]), "second": gpu_model(16, devices=[0])}
        with running_on(nvml, place.folder, models) as daemon:
            assert daemon.chat("first").status == 200
            until(lambda: daemon.look("first")["vram"]["measured"], "it is measured")
            since = time.monotonic()
            assert daemon.chat("second").status == 200
            took = time.monotonic() - since
            assert took >= 1
            return Outcome("200: the next model waited until the card showed the memory as free", took)


@fault(43, "somebody else's process takes 20 of 24 GiB")
def foreign_process(place: Place) -> Outcome:
    with two_cards(place) as nvml, running_on(nvml, place.folder, {"a": gpu_model(10, devices=[0])}) as daemon:
        nvml.gpus[0].compute = {os.getpid(): 20 * GIB}
        nvml.write()
        until(lambda: card(daemon)["foreign_bytes"] >= 20 * GIB, "it is seen")
        asked = daemon.chat_soon("a")
        until(lambda: "waits: needs 10.0 GiB on gpu0" in daemon.look("a")["reason"], "the model waits")
        nvml.gpus[0].compute = {}
        since = time.monotonic()
        nvml.write()
        assert asked.result(30).status == 200
        return Outcome("waited, with the numbers in /models; 200 once the other has gone", answers_again(daemon, since))
