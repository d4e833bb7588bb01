"""How answers are shown: tables without frames, a colour per state, bars for memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from offloadd.units import format_bytes

Json = Mapping[str, Any]
_WIDE = 500
_STYLES = {
    "ready": "green",
    "waiting": "yellow",
    "starting": "yellow",
    "loading": "yellow",
    "waking": "yellow",
    "falling-asleep": "cyan",
    "sleeping": "cyan",
    "draining": "magenta",
    "stopping": "magenta",
    "backoff": "red",
    "failed": "bold red",
    "quarantined": "bold red",
    "off": "dim",
    "exited": "dim",
}

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = _WIDE  # a table that goes into a pipe or a file is not to be broken at 80 columns
aside = Console(highlight=False, soft_wrap=True, stderr=True)
"""For what is said beside the answer: progress, hints, why it waits."""


def show(answer: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print the answer as JSON, or as a person reads it."""
    if as_json:
        print_json(answer)
    else:
        console.print(render(answer))


def print_json(answer: Any) -> None:
    """The daemon's answer, unchanged."""
    print(json.dumps(answer, indent=2))


def state(word: str) -> Text:
    """A state in its colour."""
    return Text(word, _STYLES.get(word, ""))


def table(*columns: str) -> Table:
    """A table without frames. What a daemon says is text, never markup."""
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def catalog_table(answer: Any) -> Table:
    """Every model there is: configured, found on disk, still running; what it is, and where it fits."""
    result = table("model", "origin", "state", "fits", "on", "size", "quant", "params", "context", "can", "requests", "why")
    for entry in answer["data"]:
        own = entry["offloadd"]
        fitting = [offer["name"] for offer in own["backends"] if offer["available"] and offer["fits"] == own["fits"]]
        result.add_row(
            entry["id"],
            own["origin"] if own["served"] else f"{own['origin']}, not served",
            state(own["state"]),
            own["fits"],
            " ".join(fitting) or "-",
            "-" if own["size_bytes"] is None else format_bytes(own["size_bytes"]),
            own["quantization"] or "-",
            _billions(own["parameters"]),
            str(own["context"]),
            " ".join(own["capabilities"]) or "-",
            str(own["usage"]["requests"]),
            Text(own["reason"]),
        )
    return result


def _billions(count: int | None) -> str:
    """Parameters as people say them: `8.0B`, `135M`."""
    if not count:
        return "-"
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def models_table(answer: Json) -> Table:
    """`/models`: name, state, whether it fits, queue, and the sentence why."""
    rows = table("model", "state", "fits", "waiting", "why")
    for entry in answer["data"]:
        own = entry["offloadd"]
        rows.add_row(Text(entry["id"]), state(own["state"]), own["fits"], str(own["waiting"]), Text(own["reason"]))
    return rows


def backends_table(answer: Json) -> Table:
    """`/backends`: which engines can be started here, and why not; how busy, by our own count and by theirs."""
    rows = table("backend", "available", "version", "load", "queue", "runs", "holds", "kv", "why not")
    for entry in answer["backends"]:
        available = Text("yes", "green") if entry["available"] else Text("no", "red")
        why = "; ".join(part for part in (entry["reason"], entry["hint"]) if part)
        rows.add_row(
            entry["name"], available, Text(entry["version"]), str(entry["load"]), str(entry["queue"]), *_said(entry), Text(why)
        )
    return rows


def _said(entry: Json) -> tuple[str, str, str]:
    """What the engine's instances say together: requests that run and that are held back, and the fullest KV cache."""
    told = [said for each in entry["instances"] if (said := each.get("signals"))]
    caches = [each["kv_cache"] for each in told if each["kv_cache"] is not None]
    if not told:
        return "", "", ""
    running, waiting = (str(sum(each[name] for each in told)) for name in ("running", "waiting"))
    return running, waiting, f"{max(caches):.0%}" if caches else ""


def vram_table(answer: Json) -> Table:
    """`/vram/status`: the ledger, one line a device."""
    keys = ("total", "free", "foreign", "limit", "reserved", "lent", "releasing", "room")
    rows = table("device", *keys)
    for device in answer["devices"]:
        rows.add_row(device_name(device), *(format_bytes(device[f"{key}_bytes"]) for key in keys))
    return rows


def holders_table(answer: Json) -> Table:
    """`/vram/status`: who holds the memory."""
    rows = table("device", "holder", "promised", "measured", "peak")
    for device in answer["devices"]:
        for held in device["instances"]:
            sizes = (held["reserved_bytes"], held["measured_bytes"], held["peak_bytes"])
            rows.add_row(Text(device["id"]), Text(held["instance"]), *map(size, sizes))
        for process in device["foreign"]:
            rows.add_row(
                Text(device["id"]), Text(f"{process['name']} (pid {process['pid']})", "dim"), "", size(process["bytes"]), ""
            )
    for loan in answer["loans"]:
        for device_id, lent in (loan["granted"] or {}).items():
            rows.add_row(Text(device_id), Text(f"{loan['loan']} ({loan['why']})", "cyan"), size(lent), "", "")
    return rows


def device_name(device: Json) -> Text:
    """Its id, and what it is."""
    return Text(f"{device['id']} ({device['name']})")


def short_name(device: Json) -> Text:
    """The same, a GPU by its index, as sentences call it."""
    return device_name(device) if device["kind"] == "host" else Text(f"gpu{device['index']} ({device['name']})")


def size(value: int | None) -> str:
    """Bytes for people; a dash for what was not read."""
    return "-" if value is None else format_bytes(value)


def bar(device: Json, width: int) -> Text:
    """A device's memory: promised to instances, lent, being released, taken by others, free; the limit is a mark."""
    total = max(1, device["total_bytes"])
    kept = device["reserved_bytes"] - device["releasing_bytes"] - device["lent_bytes"]
    parts = (
        (kept, "█", "green"),
        (device["lent_bytes"], "█", "cyan"),
        (device["releasing_bytes"], "▓", "magenta"),
        (device["foreign_bytes"], "▒", "red"),
    )
    text, filled, cells = Text(), 0, 0
    for amount, sign, style in parts:
        filled += max(0, amount)
        until = min(width, round(width * filled / total))
        text.append(sign * (until - cells), style)
        cells = until
    text.append("·" * (width - cells), "dim")
    limit = round(width * device["limit_bytes"] / total)
    if cells <= limit < width:
        text = text[:limit] + Text("|", "yellow") + text[limit + 1 :]
    return text
