"""The shipped units under a real systemd, with the real llama-server: what an operator does, and what happens to a machine.

The steps build on one another: each takes the machine as the one before has left it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.e2e.conftest import Real
from tests.e2e.pid1 import Machine, booted
from tests.integration.daemon import CHAT, chat
from tests.integration.systemds import ROOT, UNITS, newer, staged

SERVICE = "ml-offload-api.service"
REAPER = "ml-offload-reap.service"
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody at the machine."""

    machine: Machine
    real: Real

    def write(self, text: str) -> None:
        (self.machine.root / "etc/offloadd/offloadd.yaml").write_text(text)

    def config(self, listen: str = "unix:/run/offloadd/api.sock", **changes: Any) -> str:
        """Two names for the real model, the second one on demand."""
        models = {"a": self.real.model(**changes), "b": self.real.model(run="on-demand")}
        whole = {"server": {"listen": [listen]}, "backends": {"llamacpp": self.real.llamacpp}, "models": models}
        return json.dumps(whole, indent=1)

    def show(self, name: str) -> str:
        return self.machine.show(SERVICE, name)

    @property
    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def signal(self, name: str) -> None:
        """Send the daemon a signal; to no process at all when it does not run, rather than to our own group."""
        pid = self.main_pid
        assert pid > 1, "it does not run"
        self.machine.run("kill", f"-{name}", str(pid))

    def wait_status(self, found: str, within_s: float = 60) -> str:
        """What `systemctl status` says, once it says that."""
        return until(lambda: text if found in (text := self.show("StatusText")) else None, f"the status has {found!r}", within_s)

    def servers(self) -> list[int]:
        return sorted(pid for pid, line in self.machine.processes().items() if "llama-server" in line.split(" ")[0])

    def answers(self) -> None:
        reply = self.machine.ask("POST", CHAT, json.dumps(chat("a", 3)).encode())
        assert reply.status == 200, reply

    def groups(self) -> list[Path]:
        """Control groups of servers, seen from inside."""
        service = self.machine.root / "sys/fs/cgroup/system.slice" / SERVICE
        try:
            return [path for path in service.rglob("*") if path.is_dir()]
        except FileNotFoundError:  # it has gone, perhaps in this moment
            return []


@contextmanager
def operating(real: Real, folder: Path, *drop_ins: str, tree: Path | None = None) -> Iterator[Operator]:
    """A machine with the shipped units installed, nothing of them started."""
    with booted(folder, tree) as machine:
        for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(real.llamacpp["command"][0]), real.gguf):
            machine.open_way(path / "x")
        units = staged(folder / "units", *drop_ins)
        # Nothing of the shipped unit is changed but times, and a look into /tmp should this be checked out there.
        seen = f"BindReadOnlyPaths={ROOT} {sys.prefix} {sys.base_prefix}\n"
        extra = "[Unit]\nStartLimitBurst=3\n[Service]\nWatchdogSec=6\nTimeoutAbortSec=2\n"
        extra += f"{seen}Environment=OFFLOADD_SERVER=unix:/run/offloadd/api.sock\n"
        for service, text in ((SERVICE, extra), (REAPER, f"[Service]\n{seen}")):
            (units / f"{service}.d").mkdir(exist_ok=True)
            for name in {*drop_ins} & {"engine-users"}:
                shutil.copy(UNITS / f"drop-ins/{name}.conf", units / f"{service}.d")
            (units / f"{service}.d/test.conf").write_text(text)
        shutil.copytree(units, machine.root / "run/units", dirs_exist_ok=True)
        for program, option in (("sysusers", ""), ("tmpfiles", "--create")):
            text = (UNITS / f"{program}.d/ml-offload.conf").read_text()
            (machine.root / f"run/{program}.conf").write_text(text)
            made = machine.run(*filter(None, (f"systemd-{program}", option, f"/run/{program}.conf")))
            assert made.returncode == 0, made.stderr
        machine.systemctl("start", "systemd-journald.service")
        machine.systemctl("daemon-reload")
        found = Operator(machine, real)
        found.write(found.config())
        try:
            yield found
        finally:
            print(machine.journal("-n", "200", "-o", "short-precise"))


@pytest.fixture(scope="module")
def operator(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    with operating(real, tmp_path_factory.mktemp("pid1")) as found:
        yield found


def test_it_starts_and_is_ready_when_it_listens(operator: Operator) -> None:
    started = operator.machine.systemctl("start", SERVICE)
    assert started.returncode == 0, operator.machine.journal("-n", "50")
    assert operator.show("ActiveState") == "active"
    assert operator.machine.ask("GET", "/health").status == 200
    text = operator.wait_status("1 of 2 models ready (a)")
    assert re.search(r"; host [\d.]+ [MG]iB of [\d.]+ GiB", text), text
    operator.answers()
    (server,) = operator.servers()
    status = (operator.machine.root / f"proc/{server}/status").read_text()
    user = operator.machine.run("id", "-u", "ml-offload").stdout.strip()
    assert f"Uid:\t{user}" in status
    assert re.search(r"NoNewPrivs:\t1\n(.*\n)*Seccomp:\t2", status)
    assert "CapEff:\t0000000000000000" in status


def test_the_journal_has_events_with_their_fields_and_what_they_mean_and_the_servers_output(operator: Operator) -> None:
    catalog = operator.machine.root / "usr/lib/systemd/catalog"
    catalog.mkdir(parents=True, exist_ok=True)
    shutil.copy(UNITS / "offloadd.catalog", catalog)
    assert operator.machine.run("journalctl", "--update-catalog").returncode == 0
    (line,) = operator.machine.journal("-o", "json", "-u", SERVICE, "OFFLOADD_EVENT=instance-ready").splitlines()
    entry = json.loads(line)
    assert (entry["OFFLOADD_MODEL"], entry["OFFLOADD_INSTANCE"], entry["OFFLOADD_BACKEND"]) == ("a", "a-1", "llamacpp")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("6", "offloadd")
    assert entry["CODE_FILE"].endswith(".py")
    explained = operator.machine.journal("-x", f"MESSAGE_ID={entry['MESSAGE_ID']}")
    assert "Subject: Server a-1 is ready" in explained
    written = until(lambda: operator.machine.journal("-o", "cat", "OFFLOADD_INSTANCE=a-1", "OFFLOADD_STREAM=engine"), "its output")
    assert "llama" in written
    assert operator.machine.journal("-t", "a-1", "-n", "1")


def test_a_good_reload_touches_only_what_it_names(operator: Operator) -> None:
    before = operator.servers()
    operator.write(operator.config().replace('"run": "on-demand"', '"run": "never"'))
    reloaded = operator.machine.systemctl("reload", SERVICE)
    assert reloaded.returncode == 0, reloaded.stderr
    assert json.loads(operator.machine.ask("GET", "/models/b").body)["offloadd"]["run"] == "never"
    assert operator.show("ActiveState") == "active"
    assert operator.servers() == before


def test_a_bad_reload_fails_says_where_and_changes_nothing(operator: Operator) -> None:
    before, main = operator.servers(), operator.main_pid
    operator.write(operator.config().replace('"context"', '"contxt"', 1))
    assert operator.machine.systemctl("reload", SERVICE).returncode == 1
    text = operator.wait_status("config refused")
    assert re.match(r'config refused: /etc/offloadd/offloadd.yaml:\d+:\d+: error: unknown key "contxt"', text), text
    assert (operator.show("ActiveState"), operator.main_pid, operator.servers()) == ("active", main, before)
    operator.answers()
    operator.write(operator.config())
    assert operator.machine.systemctl("reload", SERVICE).returncode == 0
    assert "refused" not in operator.wait_status("1 of 2 models ready (a)")


def test_a_daemon_that_is_killed_comes_back_to_its_server_and_nobody_is_refused(operator: Operator) -> None:
    before, main = operator.servers(), operator.main_pid
    assert int(operator.show("NFileDescriptorStore")) == 1
    piece = operator.machine.root / "dev/shm/psm_0badcafe"
    touched = operator.machine.run("setpriv", "--reuid=ml-offload", "--clear-groups", "touch", "/dev/shm/psm_0badcafe")
    assert touched.returncode == 0, touched.stderr
    folder = temporary(operator, before[0])
    assert folder.parent == operator.machine.root / "var/lib/ml-offload/tmp"
    operator.signal("KILL")
    operator.answers()  # waits for the next daemon, whose server is ready already
    assert folder.is_dir(), "the private /tmp of the service is another by now"
    assert piece.exists(), "its servers may yet open what they have in shared memory by its name"
    piece.unlink()
    assert operator.main_pid not in (0, main)
    assert operator.show("NRestarts") == "1"
    operator.wait_status("1 of 2 models ready (a)")
    assert operator.servers() == before


def test_a_daemon_that_hangs_is_replaced_and_keeps_its_server(operator: Operator) -> None:
    before = operator.servers()
    operator.signal("STOP")
    until(lambda: operator.show("NRestarts") == "2", "systemd has replaced it", 60)
    assert "Watchdog timeout" in operator.machine.journal()
    operator.wait_status("1 of 2 models ready (a)")
    operator.answers()
    assert operator.servers() == before


def test_a_stop_leaves_nothing(operator: Operator) -> None:
    assert operator.machine.systemctl("stop", SERVICE).returncode == 0
    assert (operator.show("ActiveState"), operator.show("Result")) == ("inactive", "success")
    assert operator.servers() == []
    assert operator.groups() == []
    assert operator.show("NFileDescriptorStore") == "0"


def test_a_connection_to_the_socket_unit_starts_the_service_and_waits_through_a_restart(operator: Operator) -> None:
    operator.write(operator.config(listen="127.0.0.1:9999"))  # the unit's addresses win
    assert operator.machine.systemctl("start", "ml-offload-api.socket").returncode == 0
    assert operator.show("ActiveState") == "inactive"
    operator.answers()
    assert operator.show("ActiveState") == "active"
    replies: list[int] = []
    enough = threading.Event()

    def visit() -> None:
        while not enough.is_set():
            replies.append(operator.machine.ask("GET", "/v1/models").status)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        assert operator.machine.systemctl("restart", SERVICE).returncode == 0
        served = len(replies)
        until(lambda: len(replies) > served, "somebody is served after it")
    finally:
        enough.set()
        visitor.join()
    assert set(replies) == {200}
    listening = (operator.machine.root / f"proc/{operator.main_pid}/net/tcp").read_text()
    assert f"0100007F:{9000:04X}" in listening
    assert f"0100007F:{9999:04X}" not in listening
    assert operator.machine.systemctl("stop", "ml-offload-api.socket", SERVICE).returncode == 0
    assert operator.servers() == []


def temporary(operator: Operator, pid: int) -> Path:
    """Where a server's temporary files go, seen from outside."""
    variables = (operator.machine.root / f"proc/{pid}/environ").read_bytes().split(b"\0")
    (found,) = (each for each in variables if each.startswith(b"TMPDIR="))
    return operator.machine.root / found.decode().partition("=/")[2]


def is_populated(group: Path) -> bool:
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except OSError:  # it has gone in this moment
        return False


def test_what_a_service_that_failed_for_good_has_left_is_ended(operator: Operator) -> None:
    operator.write(operator.config())
    operator.machine.systemctl("reset-failed")
    assert operator.machine.systemctl("start", SERVICE).returncode == 0
    operator.wait_status("1 of 2 models ready (a)")
    assert operator.servers()
    operator.write("models: [")  # no daemon can start with that
    operator.signal("KILL")
    until(lambda: operator.show("ActiveState") == "failed", "systemd gives up", 60)
    until(lambda: operator.servers() == [], "the server is ended", 90)
    until(lambda: not any(is_populated(group) for group in operator.groups()), "groups are empty")


def test_a_newer_systemd_follows_the_reload_itself_and_reports_the_verdict(real: Real, tmp_path: Path) -> None:
    with operating(real, tmp_path, "notify-reload", tree=newer(254).tree) as operator:
        assert "systemd 254" in operator.machine.run("systemctl", "--version").stdout
        assert operator.machine.systemctl("start", SERVICE).returncode == 0
        operator.wait_status("1 of 2 models ready (a)")
        assert operator.show("Type") == "notify-reload"
        assert operator.show("ControlGroup").endswith(SERVICE)
        before, main = operator.servers(), operator.main_pid
        assert operator.machine.systemctl("reload", SERVICE).returncode == 0
        operator.write("models: [")
        assert operator.machine.systemctl("reload", SERVICE).returncode == 1
        operator.wait_status("config refused")
        until(lambda: operator.show("SubState") == "running", "the reload is over")
        assert (operator.main_pid, operator.servers()) == (main, before)
        assert operator.machine.systemctl("stop", SERVICE).returncode == 0
        assert operator.servers() == []


def test_an_engine_of_another_user_under_the_drop_in(real: Real, tmp_path: Path) -> None:
    """The service is no root, and sees no other users' processes but by the capabilities of the drop-in."""
    with operating(real, tmp_path, "engine-users") as operator:
        operator.write(json.dumps({**json.loads(operator.config()), "backends": {"llamacpp": {**real.llamacpp, "user": "nobody"}}}))
        assert operator.machine.systemctl("start", SERVICE).returncode == 0
        operator.wait_status("1 of 2 models ready (a)")
        operator.answers()
        (server,) = operator.servers()
        assert powers(operator, server) == (65534, 0)
        assert powers(operator, operator.main_pid)[1]
        first = operator.main_pid
        operator.signal("KILL")
        until(lambda: operator.show("SubState") == "running" and operator.main_pid not in (0, first), "systemd has started another")
        operator.wait_status("1 of 2 models ready (a)")
        assert operator.servers() == [server]
        operator.write(operator.config())  # the daemon's own user: nothing of the daemon's capabilities for it either
        assert operator.machine.systemctl("reload", SERVICE).returncode == 0
        until(lambda: operator.servers() not in ([server], []), "another server takes its place")
        until(lambda: server not in operator.servers(), "the old one is gone")
        (second,) = operator.servers()
        uid, capabilities = powers(operator, second)
        assert uid not in (0, 65534)
        assert capabilities == 0
        operator.write(json.dumps({**json.loads(operator.config()), "backends": {"llamacpp": {**real.llamacpp, "user": "nobody"}}}))
        assert operator.machine.systemctl("reload", SERVICE).returncode == 0
        until(lambda: operator.servers() and powers(operator, operator.servers()[0])[0] == 65534, "it is nobody's again")
        assert operator.machine.systemctl("stop", SERVICE).returncode == 0
        assert operator.servers() == []


def powers(operator: Operator, pid: int) -> tuple[int, int]:
    """A process's user, and what it is capable of."""
    lines = (operator.machine.root / f"proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found["Uid"].split()[0]), int(found["CapEff"], 16) | int(found["CapAmb"], 16) | int(found["CapInh"], 16)
