"""How one instance begins: what it is meant to be, and the process that comes of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from dataclasses import replace

from offloadd.accounts import Account, find_account
from offloadd.backends.base import Backend
from offloadd.backends.words import fill
from offloadd.events import EventKind
from offloadd.runtime.instances import Tools
from offloadd.runtime.instances.diary import Diary
from offloadd.runtime.instances.standing import Standing
from offloadd.runtime.launchers import Process
from offloadd.state.desired import Engine
from offloadd.state.launch import Endpoint, ExitCause, ExitKind, Launch
from offloadd.state.life import Life

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


def intent(standing: Standing, backend: Backend, engine: Engine, boot: str) -> Life:
    """What is written down before anything is done."""
    action, spec = standing.action, standing.action.spec
    more = tuple(_free_port() for _ in range(backend.more_ports))
    endpoint = Endpoint(host=LOOPBACK, port=_free_port(), more=more, api=engine.api, key=secrets.token_hex(32))
    return Life(
        mark=f"{standing.id}@{secrets.token_hex(8)}",
        instance=standing.id,
        spec=spec,
        backend=action.candidate.backend,
        fingerprint=action.candidate.fingerprint,
        footprint_key=action.candidate.footprint_key,
        identity=action.candidate.facts.identity,
        placement=action.placement,
        endpoint=endpoint,
        stop_command=fill(engine.stop_command, spec, action.candidate.facts, endpoint),
        user=engine.user,
        group=engine.group,
        boot=boot,
        started_at=standing.started_at,
    )


async def spawn(standing: Standing, diary: Diary, backend: Backend, engine: Engine, tools: Tools) -> Process:
    """Start what was meant; AccountError or OSError when that cannot be. It is in nobody's hands but the caller's."""
    account = await asyncio.to_thread(find_account, engine.user, engine.group)
    await _give_folder(standing, diary, tools, account)
    # From here on nothing waits: whoever is cancelled has either the process or has begun none.
    action, life = standing.action, diary.life
    launch = backend.launch(engine, action.spec, action.candidate.facts, action.placement, life.endpoint)
    if life.endpoint.folder:
        launch = Launch(argv=launch.argv, env={"TMPDIR": life.endpoint.folder, **launch.env})
    process = tools.launcher.spawn(launch, mark=life.mark, log_path=tools.logs.path(standing.id), account=account)
    said = standing.about(EventKind.INSTANCE_SPAWNED, pid=process.pid, port=life.endpoint.port)
    log.info("%s: pid %d on port %d: %s", standing.id, process.pid, life.endpoint.port, action.why, extra=said)
    return process


def not_started(engine: Engine, error: OSError) -> ExitCause:
    """Why its program could not be run."""
    hint = f"check backends.{engine.name}.command"
    message = f"cannot run {engine.command[0]}: {error.strerror or error}"
    return ExitCause(kind=ExitKind.NOT_STARTED, message=message, hint=hint)


async def _give_folder(standing: Standing, diary: Diary, tools: Tools, account: Account | None) -> None:
    """One of its own for temporary files; without, they go where everybody's go. It is written down with the process."""
    folder = await asyncio.to_thread(tools.launcher.make_folder, diary.life.mark, account)
    diary.learn(endpoint=replace(diary.life.endpoint, folder=folder))
    if not folder:
        said = standing.about(EventKind.INSTANCE_SPAWNED)
        log.warning("%s: no folder can be made for its temporary files; what it leaves stays in /tmp", standing.id, extra=said)


def _free_port() -> int:
    """A port that nobody holds now. Another may take it before the engine does: that ends the start with PORT_TAKEN."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
