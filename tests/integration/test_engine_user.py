"""`backends.NAME.user`: engines run as somebody else, with none of the daemon's rights, and are ended and found again all the same.

Real users, so real rights: all of it needs root, and says so where there is none.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from offloadd.accounts import AccountError, find_account, step_to
from tests.conformance.servers import HOST, free_port, until
from tests.integration.daemon import CHAT, Daemon, again, alive, chat, command, launch, supervised, wait_healthy

NOBODY = "nobody"
SERVANT = "daemon"
"""A user of every machine, for a daemon that is not root."""
CAPABILITIES = "+setuid,+setgid,+kill,+sys_ptrace"
TO_READ_ALL = ",+dac_read_search"
"""Also, so that this user can read the interpreter and the clone, wherever they are. No engine must have it."""

ENGINE = '''
"""An engine that says who it is, and tries what it should not be able to do."""
import http.server, json, os, pathlib, socket, subprocess, sys

def told(path):
    try:
        with open(path) as file:
            return file.read(8)
    except OSError as error:
        return type(error).__name__

def reached(path):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
            return "connected"
        except OSError as error:
            return type(error).__name__

def signalled(pid):
    try:
        os.kill(pid, 0)
        return "may"
    except OSError as error:
        return type(error).__name__

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        seen = {
            "uids": list(os.getresuid()), "gids": list(os.getresgid()), "groups": sorted(os.getgroups()),
            "capabilities": [status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")],
            "no_new_privs": status["NoNewPrivs"].strip(),
            "environment": {name: os.environ.get(name) for name in sys.argv[4:]},
            "secret": told(sys.argv[2]), "socket": reached(sys.argv[3]), "kill": signalled(os.getppid()),
        }
        message = {"role": "assistant", "content": json.dumps(seen)}
        self.answer({"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_):
        pass

subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("engine of uid", os.getuid(), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''


@functools.cache
def interpreter() -> str:
    """A Python that nobody in particular can run."""
    for path in ("/usr/bin/python3", os.path.realpath(sys.executable)):
        if subprocess.run(as_user(NOBODY, path, "-c", ""), check=False, capture_output=True).returncode == 0:
            return path
    pytest.skip("no Python here can be run by another user")


def as_user(name: str, *words: str, capabilities: str = "") -> list[str]:
    entry = pwd.getpwnam(name)
    kept = [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"] if capabilities else []
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", *kept, *words]


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can start processes as other users")
    with contextlib.suppress(AccountError):
        step_to(find_account(NOBODY))
        return
    pytest.skip("this root has too few capabilities to become another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may enter: pytest's own are private to whoever runs it."""
    path = Path(tempfile.mkdtemp(prefix="offloadd-user-"))
    path.chmod(0o755)
    (path / "engine.py").write_text(ENGINE)
    (path / "engine.py").chmod(0o644)
    (path / "secret").write_text("of the daemon")
    (path / "secret").chmod(0o600)
    yield path
    shutil.rmtree(path)


VARIABLES = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TMPDIR", "SECRET")
"""What the engine is to tell of its environment."""
MODELS = {"a": {"source": "x", "backends": ["who"], "run": "always", "vram": "16MiB"}}


def start(folder: Path, **engine: Any) -> Daemon:
    """A daemon with one engine, given `engine` in the config."""
    port = free_port()
    words = [interpreter(), str(folder / "engine.py"), "${port}", str(folder / "secret"), str(folder / "api.sock"), *VARIABLES]
    sections = {
        "backends": {"who": {"kind": "custom", "command": words, **engine}},
        "server": {"listen": [f"{HOST}:{port}", f"unix:{folder / 'api.sock'}"]},
    }
    ours = {"XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder), "SECRET": "s"}
    found = launch(folder, MODELS, env=ours, **sections)
    found.port = port
    return found


def seen(daemon: Daemon) -> dict[str, Any]:
    """What the engine says of itself."""
    reply = daemon.post(CHAT, chat())
    assert reply.status == 200, reply
    return dict(json.loads(reply.json()["choices"][0]["message"]["content"]))


def sleeper(daemon: Daemon) -> int:
    """The process that the engine has started in a session of its own."""
    (found,) = set(daemon.leftovers()) - {daemon.pid()}
    return found


def test_an_engine_of_another_user_has_nothing_of_the_daemons_rights(folder: Path) -> None:
    entry = pwd.getpwnam(NOBODY)
    with supervised(start(folder, user=NOBODY)) as daemon:
        daemon.wait_for()
        it = seen(daemon)
        assert it["uids"] == [entry.pw_uid] * 3
        assert it["gids"] == [entry.pw_gid] * 3
        assert 0 not in it["groups"]
        gpus = {grp.getgrnam(name).gr_gid for name in ("video", "render") if name in {each.gr_name for each in grp.getgrall()}}
        assert set(it["groups"]) == {*os.getgrouplist(NOBODY, entry.pw_gid), *gpus}
        assert {int(each, 16) for each in it["capabilities"]} == {0}
        assert it["no_new_privs"] == "1"
        who = {"HOME": entry.pw_dir, "USER": NOBODY, "LOGNAME": NOBODY}
        folder = Path(it["environment"]["TMPDIR"])
        assert it["environment"] == {**who, "XDG_CACHE_HOME": None, "TMPDIR": str(folder), "SECRET": None}
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (entry.pw_uid, 0o700)
        assert (it["secret"], it["socket"], it["kill"]) == ("PermissionError",) * 3
        log = next(daemon.data_dir.glob("logs/a-*.log"))
        assert f"engine of uid {entry.pw_uid}" in log.read_text()
        assert log.stat().st_uid == 0
    assert not folder.parent.exists()


def test_the_group_and_the_environment_are_as_the_config_says(folder: Path) -> None:
    with supervised(start(folder, user=NOBODY, group="daemon", env={"HOME": "/srv/cache"})) as daemon:
        daemon.wait_for()
        it = seen(daemon)
        assert it["gids"] == [grp.getgrnam("daemon").gr_gid] * 3
        assert it["environment"]["HOME"] == "/srv/cache"


def test_it_is_stopped_with_all_that_it_has_started(folder: Path) -> None:
    with supervised(start(folder, user=NOBODY)) as daemon:
        first, beside = daemon.pid(), sleeper(daemon)
        assert daemon.post("/models/a/unload?wait=1", None).status == 200
        assert not alive(first)
        until(lambda: not alive(beside), "what it has started is ended")


def test_a_change_of_the_user_replaces_it(folder: Path) -> None:
    with supervised(start(folder, user=NOBODY)) as daemon:
        first = daemon.pid()
        engine = {**daemon.base["backends"]["who"], "user": SERVANT}
        daemon.apply(MODELS, backends={"who": engine})
        until(lambda: not alive(first), "the old one is gone")
        daemon.wait_for()
        assert seen(daemon)["uids"] == [pwd.getpwnam(SERVANT).pw_uid] * 3


def test_a_daemon_that_was_killed_finds_it_again_and_can_end_it(folder: Path) -> None:
    daemon = start(folder, user=NOBODY)
    try:
        first = wait_healthy(daemon).pid()
        daemon.process.kill()
        daemon.process.wait()
        with supervised(again(folder, daemon.config_path, daemon.base)) as second:
            assert second.pid() == first
            assert seen(second)["uids"][0] == pwd.getpwnam(NOBODY).pw_uid
        assert not alive(first)
    finally:
        daemon.discard()


def test_offloadd_reap_ends_it(folder: Path) -> None:
    daemon = start(folder, user=NOBODY)
    try:
        first = wait_healthy(daemon).pid()
        daemon.process.kill()
        daemon.process.wait()
        words = [sys.executable, "-m", "offloadd", "reap", str(daemon.data_dir)]
        assert "ended" in subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert not alive(first)
    finally:
        daemon.discard()


def refusal(daemon: Daemon) -> str:
    """Why its model does not run. Nothing of it was ever started."""
    wait_healthy(daemon)
    reason = str(daemon.wait_for(state="failed")["reason"])
    assert not daemon.launches()
    assert not daemon.leftovers()
    return reason


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"user": "no-such-user"}, 'there is no user "no-such-user" on this machine'),
        ({"user": NOBODY, "group": "no-such-group"}, 'there is no group "no-such-group" on this machine'),
        ({"user": "root"}, 'the user "root" is root'),
    ],
)
def test_who_cannot_be_become_is_told_and_nothing_is_started(folder: Path, engine: Mapping[str, str], said: str) -> None:
    with supervised(start(folder, **engine)) as daemon:
        assert said in refusal(daemon)
        checked = check(daemon)
        assert checked.returncode == 0
        assert said in checked.stdout
        line = 1 + daemon.config_path.read_text()[: daemon.config_path.read_text().index('"user"')].count("\n")
        assert f"{daemon.config_path}:{line}:" in checked.stdout


def check(daemon: Daemon, *before: str) -> subprocess.CompletedProcess[str]:
    words = [*before, sys.executable, "-m", "offloadd", "check", str(daemon.config_path)]
    return subprocess.run(words, check=False, capture_output=True, text=True)


def test_a_root_that_may_not_change_users_says_so_and_starts_nothing(folder: Path) -> None:
    first = start(folder, user=NOBODY)
    first.discard()
    bound = ("setpriv", "--bounding-set=-setuid")
    assert "it lacks CAP_SETUID" in check(first, *bound).stdout
    with supervised(spawned(first, [*bound, *command(first.config_path)])) as daemon:
        assert 'the daemon may not change to the user "nobody": it lacks CAP_SETUID' in refusal(daemon)


def spawned(daemon: Daemon, words: list[str], **env: str) -> Daemon:
    """Another daemon for the same config, started by these words."""
    with daemon.log_path.open("wb") as log:
        process = subprocess.Popen(
            words, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return Daemon(process, daemon.port, daemon.folder, daemon.config_path, daemon.log_path, daemon.base)


@pytest.mark.parametrize("user", [NOBODY, None])
def test_a_daemon_that_is_not_root_passes_none_of_its_capabilities_on(folder: Path, user: str | None) -> None:
    first = start(folder, **({"user": user} if user else {}))
    first.discard()
    shutil.rmtree(first.data_dir, ignore_errors=True)
    os.chown(folder, pwd.getpwnam(SERVANT).pw_uid, -1)
    os.chown(folder / "secret", pwd.getpwnam(SERVANT).pw_uid, -1)
    (folder / "api.sock").unlink(missing_ok=True)
    words = as_user(SERVANT, *command(first.config_path), capabilities=CAPABILITIES + TO_READ_ALL)
    with supervised(spawned(first, words, HOME=str(folder))) as daemon:
        until(lambda: daemon.state() == "ready", "it is ready")
        it = seen(daemon)
        assert it["uids"] == [pwd.getpwnam(user or SERVANT).pw_uid] * 3
        assert {int(each, 16) for each in it["capabilities"]} == {0}
        assert it["secret"] == ("PermissionError" if user else "of the d")
        temporary = Path(it["environment"]["TMPDIR"])
        assert temporary.stat().st_uid == pwd.getpwnam(user or SERVANT).pw_uid
    assert not (temporary.parent if user else temporary).exists()


def test_a_daemon_without_capabilities_starts_no_engine_of_another_user(folder: Path) -> None:
    first = start(folder, user=NOBODY)
    first.discard()
    shutil.rmtree(first.data_dir, ignore_errors=True)
    os.chown(folder, pwd.getpwnam(SERVANT).pw_uid, -1)
    words = as_user(SERVANT, *command(first.config_path), capabilities=TO_READ_ALL.lstrip(","))
    with supervised(spawned(first, words, HOME=str(folder))) as daemon:
        assert "it lacks CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE" in refusal(daemon)
