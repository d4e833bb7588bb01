"""What the daemon holds: by its own word in `/metrics`, and by the kernel's in `/proc`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.servers import until
from tests.integration.daemon import Daemon

SPARE_THREADS = 2
"""A thread that waits for a device or a disk is replaced while it does."""
_OWN = {
    "offloadd_tasks": "tasks",
    "offloadd_client_connections": "connections of clients",
    "offloadd_engine_connections": "connections to engines",
    "offloadd_request_leases": "leases",
    "offloadd_body_bytes": "bytes of bodies",
    "offloadd_model_running_requests": "requests that run",
    "offloadd_model_waiting_requests": "requests that wait",
    "offloadd_loans": "loans",
    "offloadd_device_reserved_bytes": "bytes promised",
    "offloadd_device_lent_bytes": "bytes lent",
    "offloadd_device_releasing_bytes": "bytes on their way back",
    "offloadd_instances": "instances",
}

Held = Mapping[str, int]


def scraped(daemon: Daemon) -> Counter[str]:
    """What the daemon says of itself, summed over all labels."""
    found: Counter[str] = Counter()
    text = daemon.request("GET", "/metrics").body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if what := _OWN.get(sample.name):
                found[what] += int(sample.value)
            elif sample.name == "offloadd_requests_total":
                found[f"fate {sample.labels['fate']}"] += int(sample.value)
    return found


def look(daemon: Daemon) -> Held:
    """Everything that must not grow, now."""
    found = Counter({what: count for what, count in scraped(daemon).items() if not what.startswith("fate ")})
    process = psutil.Process(daemon.process.pid)
    found["threads"] = process.num_threads()
    found["children"] = len(process.children(recursive=True))
    found["processes that bear its mark"] = len(daemon.leftovers())
    for kind, count in _files(daemon.process.pid).items():
        found[f"files: {kind}"] = count
    return found


def least(daemon: Daemon, looks: int = 10) -> Held:
    """The least that is held in some looks: what a probe or a scrape holds for a moment is in none of them for long."""
    seen = [look(daemon) for _ in range(looks)]
    return {what: min(each[what] for each in seen) for what in set().union(*seen)}


def grown(before: Held, now: Held) -> dict[str, tuple[int, int]]:
    """What there is more of, before and now."""
    play = {"threads": SPARE_THREADS}
    return {what: (before.get(what, 0), count) for what, count in now.items() if count > before.get(what, 0) + play.get(what, 0)}


def nothing_left(daemon: Daemon, before: Held, within_s: float = 30.0) -> Held:
    """Until nothing is held that was not held before; AssertionError says what is."""
    seen: list[dict[str, tuple[int, int]]] = []

    def gone() -> Held | None:
        now = look(daemon)
        seen.append(grown(before, now))
        return None if seen[-1] else now

    try:
        found: Held = until(gone, "all is given back", within_s)
    except AssertionError:
        lasting = set(seen[-1]).intersection(*seen[-10:])
        raise AssertionError(f"still held (before, now): { {what: seen[-1][what] for what in sorted(lasting)} }") from None
    return found


def _files(pid: int) -> Counter[str]:
    """Open descriptors by what they are."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        found[re.sub(r":?\[\d+\]|-\d+(?=\.log)", "", target).removesuffix(" (deleted)")] += 1
    return found
