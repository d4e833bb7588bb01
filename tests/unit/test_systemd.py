"""What systemd is told, and what it hands over: heard by a small manager of our own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offloadd.systemd import Manager, Received, listens, name_of
from tests.fakes.systemd import ServiceManager


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path, watchdog_s=30) as manager:
        yield manager


def manager_for(peer: ServiceManager) -> Manager:
    return Manager.from_environment(dict(peer.environment))


def test_its_variables_are_read_once_and_taken_away(peer: ServiceManager) -> None:
    environ = {**peer.environment, "LISTEN_PID": str(os.getpid()), "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
    manager = Manager.from_environment(environ)
    assert environ == {"PATH": "/bin"}
    assert (manager.address, manager.watchdog) == (str(peer.address), 30)
    again = manager.environment()
    assert Manager.from_environment(again) == manager
    assert again == {}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NOTIFY_SOCKET": "relative"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
    ],
)
def test_what_is_not_meant_for_us_is_nobody(environ: dict[str, str]) -> None:
    manager = Manager.from_environment(environ)
    assert manager == Manager()
    assert environ == {}
    assert not manager.ready("fine")
    assert not manager.store("name", 0)


def test_every_message_says_what_systemd_reads(peer: ServiceManager) -> None:
    manager = manager_for(peer)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert manager.ready("2 of 3\nmodels ready")
    assert manager.reloading()
    assert manager.status("x" * 5000)
    assert not manager.status("")
    assert manager.alive()
    assert manager.stopping(90)
    peer.wait_word("STOPPING", "1")
    ready, reloading, status, alive, stopping = (message.words for message in peer.messages)
    assert ready == [("READY", "1"), ("STATUS", "2 of 3 models ready")]
    assert reloading[0] == ("RELOADING", "1")
    assert before <= int(dict(reloading)["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert len(dict(status)["STATUS"]) == 1000
    assert alive == [("WATCHDOG", "1")]
    assert stopping == [("STOPPING", "1"), ("EXTEND_TIMEOUT_USEC", "90000000")]


def test_an_abstract_address_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0offloadd-test-{os.getpid()}")
        assert Manager(f"@offloadd-test-{os.getpid()}").alive()
        assert listener.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_went_away_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert not Manager(str(tmp_path / "gone")).ready()


def test_descriptors_are_kept_once_and_let_go_by_name(peer: ServiceManager) -> None:
    manager = manager_for(peer)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        read, write = os.pipe()
        manager.store("listen-a", sock.fileno(), poll=False)
        manager.store("listen-a", sock.fileno(), poll=False)
        manager.store("pipes", read, write)
        manager.alive()
        peer.wait_word("WATCHDOG")
        assert [name for name, _ in peer.stored] == ["listen-a", "pipes", "pipes"]
        assert peer.messages[0]["FDPOLL"] == "0"
        assert "FDPOLL" not in peer.messages[2]
        manager.remove("pipes")
        manager.alive()
        peer.wait_word("WATCHDOG", since=5)
        assert [name for name, _ in peer.stored] == ["listen-a"]
        os.close(read)
        os.close(write)
    with pytest.raises(ValueError, match="cannot name"):
        manager.store("a:b", 0)


def test_a_new_process_is_handed_sockets_and_kept_descriptors_under_their_names(peer: ServiceManager, tmp_path: Path) -> None:
    port = peer.listen(("127.0.0.1", 0))[1]
    with (tmp_path / "file").open("w") as file:
        manager_for(peer).store("log-a-1", file.fileno())
        peer.wait_word("FDSTORE")
    script = (
        "import os; from offloadd.systemd import Manager, listens, name_of; import socket;"
        "m = Manager.from_environment(); a, b = m.received;"
        "print(a, listens(a.fd), name_of(socket.socket(fileno=a.fd)), b, listens(b.fd),"
        " os.get_inheritable(3), os.get_inheritable(4),"
        " sorted(n for n in os.environ if n.startswith(('LISTEN_', 'NOTIFY_', 'WATCHDOG_'))))"
    )
    log = tmp_path / "out"
    assert peer.spawn([sys.executable, "-c", script], log).wait(30) == 0
    first, second = Received("ml-offload-api.socket", 3), Received("log-a-1", 4)
    assert log.read_text().strip() == f"{first} True 127.0.0.1:{port} {second} False False False []"


def test_what_nobody_takes_is_closed_and_forgotten(peer: ServiceManager) -> None:
    manager = manager_for(peer)
    read, write = os.pipe()
    manager.received = [Received("child-1", read), Received("old", write)]
    assert manager.take(lambda one: one.name.startswith("child-")) == [Received("child-1", read)]
    manager.discard_rest()
    assert manager.received == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write)
    os.close(read)
    assert peer.messages[peer.wait_word("FDSTOREREMOVE")]["FDNAME"] == "old"


def test_addresses_are_named_as_the_config_writes_them(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as file, socket.socket(socket.AF_INET6) as v6:
        file.bind(str(tmp_path / "s"))
        assert name_of(file) == f"unix:{tmp_path}/s"
        assert not listens(file.fileno())
        file.listen()
        assert listens(file.fileno())
        v6.bind(("::1", 0))
        assert name_of(v6) == f"[::1]:{v6.getsockname()[1]}"


def test_our_variables_do_not_reach_children_of_the_command(peer: ServiceManager) -> None:
    """They are gone from the process itself, not only from a copy."""
    script = "from offloadd.systemd import Manager; Manager.from_environment(); import subprocess; subprocess.run(['env'])"
    shown = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **peer.environment}, capture_output=True, text=True, check=True
    ).stdout
    assert not [line for line in shown.splitlines() if line.startswith(("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_"))]
