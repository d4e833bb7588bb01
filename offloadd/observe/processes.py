"""What /proc tells about an instance's processes. Everything here blocks: call it in a thread."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from offloadd.units import Bytes


def tree(pid: int) -> Iterator[psutil.Process]:
    """The process and its descendants; those that end meanwhile are left out."""
    try:
        leader = psutil.Process(pid)
        yield leader
        yield from leader.children(recursive=True)
    except psutil.Error:
        return


def holds_port(pid: int, port: int) -> bool:
    """Whether the process or a descendant of it listens on the TCP port."""
    for process in tree(pid):
        try:
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == port for s in sockets):
            return True
    return False


def own_memory(pid: int) -> Bytes | None:
    """RAM that only this tree holds: resident pages less those backed by files, which the page cache may drop. None when gone."""
    total = 0
    seen = False
    for process in tree(pid):
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        seen = True
        total += max(0, memory.rss - memory.shared)
    return Bytes(total) if seen else None
