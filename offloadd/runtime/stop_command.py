"""The command that ends a server which signals do not reach, such as one in a container."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from offloadd.accounts import AccountError, find_account, step_to
from offloadd.environment import engine_environment
from offloadd.state.desired import Engine
from offloadd.units import Seconds

STOP_WITHIN = Seconds(30)
"""The longest that those of an earlier daemon may take, all of them at once: nobody is served meanwhile."""


async def run_stop_command(words: Sequence[str], engine: Engine, limit: Seconds) -> str:
    """Run it to its end as the engine's user, or kill it after `limit`; why it failed, empty when it did not."""
    try:
        account = await asyncio.to_thread(find_account, engine.user, engine.group)
        step = step_to(account)
    except AccountError as error:
        return error.message
    try:
        process = await asyncio.create_subprocess_exec(
            *step,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=engine_environment(engine.env, account.environment if account else None),
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot run {words[0]}: {error.strerror or error}"
    try:
        async with asyncio.timeout(limit):
            code = await process.wait()
    except TimeoutError:
        return f"{words[0]} did not end within {limit:g} s"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            await process.wait()
    return "" if code == 0 else f"{words[0]} ended with exit code {code}"
