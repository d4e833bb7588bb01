"""Memory that people borrow: models leave for it, the command sees its card, and all of it comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.fakes.nvml.fake import FakeNvml
from tests.integration.daemon import Daemon, alive
from tests.integration.gpu import GIB, LIMIT, Watch, card, cards, gpu_model, running_on, wait_card


@pytest.fixture
def nvml(tmp_path: Path) -> FakeNvml:
    """Two cards of 24 GiB."""
    return cards(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, FakeNvml]]:
    """One daemon, on two cards, for loans that leave all as it was."""
    folder = tmp_path_factory.mktemp("shared")
    nvml = cards(folder)
    with running_on(nvml, folder, {"a": gpu_model(13, devices=[0])}) as daemon:
        yield daemon, nvml


def ctl(daemon: Daemon, *words: str) -> list[str]:
    """A command line of offloadctl for this daemon."""
    return [sys.executable, "-c", "from offloadd.ctl import main; main()", "--server", f"http://127.0.0.1:{daemon.port}", *words]


def borrow(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """`offloadctl borrow` to its end."""
    return subprocess.run(ctl(daemon, "borrow", *words), capture_output=True, text=True, timeout=30)


@contextlib.contextmanager
def borrower(daemon: Daemon, *words: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """`offloadctl borrow` for as long as the block lasts."""
    process = subprocess.Popen(
        ctl(daemon, "borrow", *words),
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def loans(daemon: Daemon) -> Any:
    return daemon.get("/vram/status")["loans"]


def test_models_leave_for_a_command_and_its_exit_code_is_passed_on(nvml: FakeNvml, tmp_path: Path) -> None:
    # By rank, since which of two alike is the cheaper one to load again is a matter of milliseconds.
    models = {"a": gpu_model(12), "b": gpu_model(14, priority=90), "pinned": gpu_model(4, pinned=True, devices=[1])}
    with running_on(nvml, tmp_path, models) as daemon, Watch(daemon, nvml) as watch:
        assert [daemon.chat(name).status for name in models] == [200, 200, 200]
        done = borrow(daemon, "18GiB", "--", "sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES/$ROCR_VISIBLE_DEVICES"; exit 7')
        assert done.returncode == 7
        uuid = nvml.gpus[0].uuid
        assert done.stdout == f"{uuid}/{uuid}\n"
        assert "18.0 GiB on gpu0" in done.stderr
        assert daemon.look("a")["last_exit"]["message"].startswith("to make room for a loan (sh -c echo")
        assert daemon.state("pinned") == "ready"
        wait_card(daemon, 0, lent_bytes=0, reserved_bytes=0, room_bytes=LIMIT)
        assert loans(daemon) == []
        assert daemon.chat("a").status == 200
    assert not watch.wrong


def test_what_the_command_takes_is_lent_and_not_foreign(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, nvml = shared
    script = f'echo "$CUDA_VISIBLE_DEVICES {9 * GIB}" > "$FAKE_NVML_PROCS/$$"; exec sleep 600'
    words = ("10GiB", "--device", "1", "--", "sh", "-c", script)
    with borrower(daemon, *words, env={"FAKE_NVML_PROCS": str(nvml.procs)}) as process:
        # One gibibyte of it is still to be taken.
        found = wait_card(daemon, 1, used_bytes=9 * GIB + nvml.gpus[1].reserved, room_bytes=LIMIT - 10 * GIB)
        assert (found["lent_bytes"], found["reserved_bytes"]) == (10 * GIB, 10 * GIB)
        assert (found["foreign"], found["foreign_bytes"]) == ([], nvml.gpus[1].reserved)
        (loan,) = loans(daemon)
        assert loan["granted"] == {nvml.gpus[1].uuid: 10 * GIB}
        assert loan["reason"] == "holds 10.0 GiB on gpu1"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    wait_card(daemon, 1, lent_bytes=0, used_bytes=nvml.gpus[1].reserved, room_bytes=LIMIT)


def test_a_loan_ends_with_its_time_and_the_command_does_not(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    with borrower(daemon, "20GiB", "--device", "0", "--for", "1s", "--", "sleep", "600") as process:
        wait_card(daemon, 0, lent_bytes=20 * GIB)
        wait_card(daemon, 0, lent_bytes=0)
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert "20.0 GiB on gpu0" in lines[0]
        assert "has ended: its time of 1s is over; its memory may be given away now" in lines[1]
        assert process.poll() is None
        assert loans(daemon) == []


def test_a_borrower_that_is_killed_gives_back_what_it_had(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    with borrower(daemon, "20GiB", "--device", "0", "--", "sleep", "600") as process:
        wait_card(daemon, 0, lent_bytes=20 * GIB)
        asked = daemon.chat_soon("a")
        until(lambda: daemon.state("a") == "waiting", "the model waits for it")
        process.kill()
        assert asked.result(10).status == 200
    assert loans(daemon) == []


def test_a_borrower_waits_for_those_at_work_and_is_told_so(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    with daemon.stream("a", 2000) as stream, borrower(daemon, "20GiB", "--device", "0", "--", "sleep", "600") as process:
        stream.skip(2)
        until(lambda: loans(daemon), "it is asked for")
        assert process.stderr is not None
        assert "waits: needs 20.0 GiB on gpu0, 9.3 GiB free" in process.stderr.readline()
        assert loans(daemon)[0]["granted"] is None
        stream.skip(2)
        process.kill()
        until(lambda: not loans(daemon), "it is dropped")
        assert daemon.state("a") == "ready"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("30GiB",), "cannot be had: it needs 30.0 GiB on gpu1, more than its limit of 22.3 GiB"),
        (("23GiB", "--device", "1"), "cannot be had: it needs 23.0 GiB on gpu1, more than its limit of 22.3 GiB"),
        (("lots",), "size: expected a size such as 512MiB or 6GiB"),
        (("0GiB",), "size: 0 B is nothing to borrow"),
        (("1GiB", "--for", "soon"), "for: expected a time such as 90s, 10m or 1h"),
        (("1GiB", "--for", "500ms"), "for: 500 ms is too short to be of use"),
    ],
)
def test_a_loan_that_cannot_be_had_is_refused(shared: tuple[Daemon, FakeNvml], words: tuple[str, ...], said: str) -> None:
    daemon, _ = shared
    done = borrow(daemon, *words, "--", "echo", "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert loans(daemon) == []


def test_refusals_have_their_status(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    reply = daemon.post("/borrow", {"size": "30GiB"})
    assert reply.status == 409
    assert reply.json()["error"]["code"] == "loan_impossible"
    assert daemon.post("/borrow", {"size": "1GiB", "devices": "0"}).status == 400
    assert daemon.post("/borrow", b"{").status == 400


def test_ram_can_be_borrowed_too(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    done = borrow(daemon, "64MiB", "--device", "host", "--", "sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"')
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert "64.0 MiB on host" in done.stderr


def test_a_command_that_is_not_there_gives_back_at_once(shared: tuple[Daemon, FakeNvml]) -> None:
    daemon, _ = shared
    done = borrow(daemon, "1GiB", "--", "/no/such/program")
    assert done.returncode == 1
    assert "cannot run /no/such/program" in done.stderr
    until(lambda: not loans(daemon), "it is given back")


def test_a_waiting_loan_that_a_new_config_makes_impossible_is_refused(nvml: FakeNvml, tmp_path: Path) -> None:
    models = {"a": gpu_model(13, devices=[0], pinned=True)}
    with running_on(nvml, tmp_path, models) as daemon:
        assert daemon.chat("a").status == 200
        with borrower(daemon, "15GiB", "--device", "0", "--", "echo", "hello") as process:
            until(lambda: [loan["granted"] for loan in loans(daemon)] == [None], "it waits")
            daemon.apply(models, budget={"gpus": {"0": {"limit": "14GiB"}}})
            assert process.wait(10) == 1
            assert "more than its limit of 13.5 GiB" in process.communicate()[1]


def test_all_that_is_lent_is_let_go_when_the_daemon_ends(nvml: FakeNvml, tmp_path: Path) -> None:
    with running_on(nvml, tmp_path, {"a": gpu_model(1)}) as daemon, borrower(daemon, "20GiB", "--", "sleep", "600") as process:
        until(lambda: card(daemon)["lent_bytes"], "it is granted")
        daemon.term()
        assert daemon.exit(10) == 0
        assert alive(process.pid)
        assert process.stderr is not None
        assert "20.0 GiB on gpu0" in process.stderr.readline()
        assert "the daemon is gone" in process.stderr.readline()
