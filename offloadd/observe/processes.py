"""What /proc tells about instances' processes. Everything here blocks: call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path

import psutil

from offloadd.units import Bytes

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")

Children = Mapping[int, list[int]]
"""Pids of the children of every pid that has any."""


def read_children() -> Children:
    """One pass over all processes, however many trees are asked for afterwards."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir(_PROC):  # noqa: PTH208  (every 2 s: a Path for each process would cost more than the reading)
        if entry.isdigit():
            parent = _parent(entry)
            if parent:
                found.setdefault(parent, []).append(int(entry))
    return found


def tree(pid: int, children: Children) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for each in found:
        found.extend(child for child in children.get(each, ()) if child not in found)
    return found


def holds_port(pid: int, port: int) -> bool:
    """Whether the process or a descendant of it listens on the TCP port."""
    return any(_listens(each, port) for each in tree(pid, read_children()))


def open_ports(pid: int) -> tuple[str, ...]:
    """Addresses beyond loopback on which the process or a descendant of it listens, as `host:port`."""
    found = {address for each in tree(pid, read_children()) for address in _listening(each)}
    return tuple(sorted(f"{host}:{port}" for host, port in found if not ip_address(host).is_loopback))


def own_memory(pids: Iterable[int]) -> Bytes | None:
    """RAM that only these processes hold: resident pages less those backed by files, which the page cache may drop.

    None when none of them is there any more.
    """
    sizes = [size for size in map(_own_pages, pids) if size is not None]
    return Bytes(sum(sizes) * _PAGE) if sizes else None


def program_name(pid: int) -> str:
    """What the kernel calls the process; empty when it is gone."""
    try:
        return (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _listens(pid: int, port: int) -> bool:
    return any(number == port for _, number in _listening(pid))


def _listening(pid: int) -> list[tuple[str, int]]:
    try:
        sockets = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return []
    return [(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr]


def _parent(pid: str) -> int:
    """The fourth field of stat; the second is the program's name, which may hold anything."""
    try:
        stat = (_PROC / pid / "stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _own_pages(pid: int) -> int | None:
    try:
        resident, shared = map(int, (_PROC / str(pid) / "statm").read_bytes().split()[1:3])
    except (OSError, ValueError):
        return None
    return max(0, resident - shared)
