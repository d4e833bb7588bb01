"""`offloadctl borrow`: ask for memory, wait, run the command while the loan lasts, and give back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

import aiohttp
import typer

from offloadd.client import Server, lines
from offloadd.ctl.app import app
from offloadd.errors import OffloaddError
from offloadd.terminal import JsonOption

_NOT_GPUS = ("host",)

Event = Mapping[str, Any]
Say = Callable[[Event, str], None]
"""Tells the borrower what became of the loan, beside the command's own output."""


@app.command(context_settings={"ignore_unknown_options": True})
def borrow(
    context: typer.Context,
    size: Annotated[str, typer.Argument(help="How much memory, such as 10GiB.")],
    command: Annotated[list[str], typer.Argument(help="The command to run with it, after --.")],
    device: Annotated[str, typer.Option(help="A GPU by index or UUID, host, or auto.")] = "auto",
    limit: Annotated[str | None, typer.Option("--for", help="Give it back after this time, such as 2h.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take memory out of the daemon's budget while a command runs: models leave as needed, and come back after it.

    What becomes of the loan is told on standard error; the exit code is the command's own.
    """
    request = {"size": size, "device": device, "why": " ".join(command)[:200], **({"for": limit} if limit else {})}
    raise typer.Exit(asyncio.run(_run(context.obj, request, command, _say_json if as_json else _say)))


async def _run(server: Server, request: Mapping[str, Any], command: Sequence[str], say: Say) -> int:
    # The command will be our child: its memory is then seen to be the borrower's.
    body = {**request, "pid": os.getpid()} if server.is_here else dict(request)
    async with server.session() as session, server.open(session, "POST", "/borrow", body) as answer:
        events = _events(answer)
        devices = await _granted(events, say)
        return await _use(events, devices, command, say)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    async for line in lines(answer):
        if line.strip():
            yield json.loads(line)


async def _granted(events: AsyncIterator[Event], say: Say) -> Mapping[str, int]:
    """Read until the loan is granted, saying why it waits whenever the reason is another one."""
    said = ""
    async for event in events:
        if event.get("state") == "granted":
            say(event, event["reason"])
            return dict(event["devices"])
        if event.get("state") == "refused":
            raise OffloaddError(event["reason"])
        if event.get("reason", said) != said:
            said = event["reason"]
            say(event, said)
    raise OffloaddError("the daemon ended before it granted the loan")


async def _use(events: AsyncIterator[Event], devices: Mapping[str, int], command: Sequence[str], say: Say) -> int:
    gpus = ",".join(name for name in devices if name not in _NOT_GPUS)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "ROCR_VISIBLE_DEVICES": gpus} if gpus else None
    started: list[asyncio.subprocess.Process] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, _pass_on, started, number)
    # The terminal sends Ctrl-C to the command as well: it decides, and we outlast it.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
    try:
        process = await asyncio.create_subprocess_exec(*command, env=env)
    except OSError as error:
        raise OffloaddError(f"cannot run {command[0]}: {error.strerror}") from None
    started.append(process)
    watching = asyncio.create_task(_watch(events, say))
    code = await process.wait()
    watching.cancel()
    return code if code >= 0 else 128 - code


def _pass_on(started: Sequence[asyncio.subprocess.Process], number: int) -> None:
    for process in started:
        if process.returncode is None:
            process.send_signal(number)


async def _watch(events: AsyncIterator[Event], say: Say) -> None:
    """The loan may end before the command does: say so, the command is the borrower's to stop."""
    try:
        async for event in events:
            say(event, f"has ended: {event['reason']}; its memory may be given away now")
    except (aiohttp.ClientError, OSError):
        print("offloadctl: the daemon is gone; the memory may be given away when it is back", file=sys.stderr)


def _say(event: Event, text: str) -> None:
    print(f"offloadctl: {event['loan']} {text}", file=sys.stderr)


def _say_json(event: Event, _: str) -> None:
    print(json.dumps(event), file=sys.stderr)
