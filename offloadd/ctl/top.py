"""`offloadctl top`: memory per card, models, speed and queues, as they change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from offloadd.client import Server
from offloadd.ctl import show
from offloadd.ctl.app import app
from offloadd.ctl.show import Json, console, print_json
from offloadd.errors import OffloaddError
from offloadd.terminal import JsonOption
from offloadd.units import format_bytes, format_seconds

WINDOW_S = 15.0
"""Speed is told over this time: tokens are counted when an answer ends."""
_TOKENS = "offloadd_tokens_total"
_BAR = 32
_MAX_PROBLEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the daemon said of itself at one time."""

    health: Json
    models: Json
    vram: Json
    tokens: Mapping[str, float]
    """Tokens made so far, per model."""
    at: float

    def as_json(self, speed: Mapping[str, float]) -> dict[str, Any]:
        """For `--json`."""
        return {"health": self.health, "models": self.models["data"], "vram": self.vram, "tokens_per_second": speed}


@dataclass(slots=True)
class Speed:
    """Tokens per second of each model, over the last readings."""

    _seen: deque[tuple[float, Mapping[str, float]]] = field(default_factory=deque)

    def add(self, reading: Reading) -> dict[str, float]:
        """The speed of each model that made tokens, with this reading. A count that fell began anew: the daemon did."""
        if self._seen and any(reading.tokens.get(model, 0) < count for model, count in self._seen[-1][1].items()):
            self._seen.clear()
        self._seen.append((reading.at, reading.tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= reading.at - WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0]
        span = max(1e-9, reading.at - since)
        return {model: (count - before.get(model, 0)) / span for model, count in reading.tokens.items()} if span > 0.1 else {}


@app.command()
def top(
    context: typer.Context,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end; as when the output is no terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Memory per device, models, tokens per second and queues, as they change. q ends it.

    In a bar: green is promised to models, cyan lent, magenta being released, red taken by others; | is the limit.
    """
    if as_json or once or not console.is_terminal:
        asyncio.run(_once(context.obj, every, as_json=as_json))
    else:
        asyncio.run(_live(context.obj, every))


async def _once(server: Server, every: float, *, as_json: bool) -> None:
    """Two looks, because a speed takes two."""
    speed = Speed()
    async with server.session() as session:
        speed.add(await read(server, session))
        await asyncio.sleep(every)
        reading = await read(server, session)
    rates = speed.add(reading)
    if as_json:
        print_json(reading.as_json(rates))
    else:
        console.print(frame(reading, rates))


async def _live(server: Server, every: float) -> None:
    speed, leaving = Speed(), asyncio.Event()
    async with server.session() as session:
        reading = await read(server, session)
        with _keys(leaving), Live(frame(reading, speed.add(reading)), console=console, screen=True, auto_refresh=False) as live:
            while not leaving.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every):
                        await leaving.wait()
                try:
                    reading = await read(server, session)
                    live.update(frame(reading, speed.add(reading)), refresh=True)
                except OffloaddError as error:  # it may come back
                    live.update(Group(Text(error.message, "red"), Text(error.hint)), refresh=True)


@contextlib.contextmanager
def _keys(leaving: asyncio.Event) -> Iterator[None]:
    """While it runs, q sets the event. A standard input that is no terminal has no keys."""
    if not sys.stdin.isatty():
        yield
        return
    number, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(number)

    def pressed() -> None:
        keys = os.read(number, 64)
        if not keys or b"q" in keys.lower():
            leaving.set()

    tty.setcbreak(number)
    loop.add_reader(number, pressed)
    try:
        yield
    finally:
        loop.remove_reader(number)
        termios.tcsetattr(number, termios.TCSADRAIN, before)


async def read(server: Server, session: aiohttp.ClientSession) -> Reading:
    """Ask for all that is shown."""
    (_, health), (_, models), (_, vram) = [
        await server.ask(session, "GET", path) for path in ("/health", "/models", "/vram/status")
    ]
    async with server.open(session, "GET", "/metrics") as answer:
        text = await answer.text()
    return Reading(health=health, models=models, vram=vram, tokens=_tokens(text), at=time.monotonic())


def _tokens(exposition: str) -> dict[str, float]:
    made: dict[str, float] = {}
    lines = [line for line in exposition.splitlines() if _TOKENS.removesuffix("_total") in line]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            if sample.name == _TOKENS and sample.labels.get("kind") == "completion":
                model = sample.labels["model"]
                made[model] = made.get(model, 0.0) + sample.value
    return made


def frame(reading: Reading, speed: Mapping[str, float]) -> RenderableType:
    """One view."""
    return Group(_head(reading.health), Text(), _devices(reading.vram), Text(), _models(reading.models, speed))


def _head(health: Json) -> RenderableType:
    style = "green" if health["status"] == "ok" else "yellow"
    head = Text(f"offloadd {health['version']} is ") + Text(health["status"], style)
    head.append(f", up {format_seconds(health['uptime_s'])}, config generation {health['generation']}")
    problems = [Text(f"  {problem['what']}", "yellow") for problem in health["problems"][:_MAX_PROBLEMS]]
    more = len(health["problems"]) - len(problems)
    return Group(head, *problems, *([Text(f"  and {more} more problems: offloadctl status", "yellow")] if more > 0 else []))


def _devices(vram: Json) -> Table:
    rows = show.table("device", "memory", "used", "total", "promised", "room", "load")
    for device in vram["devices"]:
        sizes = (format_bytes(device[f"{key}_bytes"]) for key in ("used", "total", "reserved", "room"))
        rows.add_row(show.short_name(device), show.bar(device, _BAR), *sizes, _load(device))
    return rows


def _load(device: Json) -> str:
    parts = (
        f"{device['utilization']:.0%}" if device["utilization"] is not None else "",
        f"{device['temperature_c']:g} °C" if device["temperature_c"] is not None else "",
        f"{device['power_w']:.0f} W" if device["power_w"] is not None else "",
    )
    return " ".join(part for part in parts if part)


def _models(models: Json, speed: Mapping[str, float]) -> Table:
    """Those that do something first, then by name."""
    rows = show.table("model", "state", "busy", "queue", "kv", "tokens/s", "memory", "why")
    for entry in sorted(models["data"], key=lambda each: (each["offloadd"]["state"] == "off", each["id"])):
        own = entry["offloadd"]
        rows.add_row(
            Text(entry["id"]),
            show.state(own["state"]),
            _busy(own["instances"]),
            str(own["waiting"] or ""),
            _cache(own["instances"]),
            f"{speed.get(entry['id'], 0):.1f}" if speed.get(entry["id"]) else "",
            format_bytes(sum(each["reserved_bytes"] for each in own["instances"])) if own["instances"] else "",
            Text(own["reason"]),
        )
    return rows


def _cache(instances: Iterable[Json]) -> str:
    """How full the fullest KV cache is, where engines tell."""
    told = [said["kv_cache"] for each in instances if (said := each.get("signals")) and said["kv_cache"] is not None]
    return f"{max(told):.0%}" if told else ""


def _busy(instances: Iterable[Json]) -> str:
    listed = list(instances)
    return f"{sum(each['load'] for each in listed)}/{sum(each['slots'] for each in listed)}" if listed else ""
