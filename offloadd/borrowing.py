"""The borrower's side of a loan: ask, wait, run the command while the loan lasts, and give back."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from yarl import URL

from offloadd.errors import OffloaddError

_NOT_GPUS = ("host",)


def run(url: str, request: Mapping[str, Any], command: Sequence[str]) -> int:
    """Borrow, run, give back; the command's exit code. OffloaddError when the loan cannot be had."""
    return asyncio.run(_run(url, request, command))


async def _run(url: str, request: Mapping[str, Any], command: Sequence[str]) -> int:
    # The command will be our child: its memory is then seen to be the borrower's.
    body = {**request, "pid": os.getpid()} if _is_here(url) else dict(request)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=5)) as session,
            session.post(url.rstrip("/") + "/borrow", json=body) as answer,
        ):
            if answer.status != 200:
                raise OffloaddError((await answer.json())["error"]["message"])
            devices = await _granted(answer)
            return await _use(answer, devices, command)
    except (aiohttp.ClientError, OSError) as error:
        raise OffloaddError(f"no answer from {url}: {error or type(error).__name__}", hint="is the daemon running?") from None


async def _granted(answer: aiohttp.ClientResponse) -> Mapping[str, int]:
    """Read until the loan is granted, saying why it waits whenever the reason is another one."""
    said = ""
    async for line in answer.content:
        event = json.loads(line) if line.strip() else {}
        if event.get("state") == "granted":
            print(f"offloadctl: {event['loan']} {event['reason']}", file=sys.stderr)
            return dict(event["devices"])
        if event.get("state") == "refused":
            raise OffloaddError(event["reason"])
        if event.get("reason", said) != said:
            said = event["reason"]
            print(f"offloadctl: {event['loan']} {said}", file=sys.stderr)
    raise OffloaddError("the daemon ended before it granted the loan")


async def _use(answer: aiohttp.ClientResponse, devices: Mapping[str, int], command: Sequence[str]) -> int:
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
    watching = asyncio.create_task(_watch(answer))
    code = await process.wait()
    watching.cancel()
    return code if code >= 0 else 128 - code


def _pass_on(started: Sequence[asyncio.subprocess.Process], number: int) -> None:
    for process in started:
        if process.returncode is None:
            process.send_signal(number)


async def _watch(answer: aiohttp.ClientResponse) -> None:
    """The loan may end before the command does: say so, the command is the borrower's to stop."""
    try:
        async for line in answer.content:
            if line.strip():
                event = json.loads(line)
                print(
                    f"offloadctl: {event['loan']} has ended: {event['reason']}; its memory may be given away now", file=sys.stderr
                )
    except (aiohttp.ClientError, OSError):
        print("offloadctl: the daemon is gone; the memory may be given away when it is back", file=sys.stderr)


def _is_here(url: str) -> bool:
    host = URL(url).host or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
