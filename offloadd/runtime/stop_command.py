"""The command that ends a server which signals do not reach, such as one in a container."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

from offloadd.environment import engine_environment
from offloadd.units import Seconds


async def run_stop_command(words: Sequence[str], env: Mapping[str, str], limit: Seconds) -> str:
    """Run it to its end, or kill it after `limit`; why it failed, empty when it did not."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=engine_environment(env),
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
                process.kill()
            await process.wait()
    return "" if code == 0 else f"{words[0]} ended with exit code {code}"
