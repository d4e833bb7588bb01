"""What is written down of an instance, so that a daemon that comes after this one can find its process and vouch for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offloadd.state.desired import ModelSpec
from offloadd.state.ids import BackendName, DeviceId, InstanceId
from offloadd.state.launch import Endpoint, Placement
from offloadd.units import Bytes, Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process that cannot be mistaken for another: pids are used again, but not with the same start in the same boot."""

    pid: int
    started: int
    """Clock ticks since boot, field 22 of its stat."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SharedPiece:
    """A piece of the machine's shared memory, which outlives whoever made it. By its name alone it could be another's."""

    name: str
    """In /dev/shm."""
    device: int
    inode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One instance: what it was meant to be, written before it is spawned, and what came of it."""

    mark: str
    """The nonce that its processes carry in their environment."""
    instance: InstanceId
    spec: ModelSpec
    """Without environment, arguments and rules: they may hold secrets, and the fingerprint tells whether they have changed."""
    backend: BackendName
    fingerprint: str
    footprint_key: str = ""
    identity: str = ""
    """The model file's identity at the start."""
    placement: Placement
    endpoint: Endpoint
    boot: str
    """The machine's boot: instants and start times mean nothing in another."""
    started_at: Instant
    process: ProcessId | None = None
    """None from the intent to the record; its process, if there is one, is then found by its mark."""
    ready_at: Instant | None = None
    asleep: Mapping[DeviceId, Bytes] | None = None
    """What it holds of its GPUs asleep; None while it is promised all of its memory."""
    stop_command: tuple[str, ...] = ()
    """Ends its server where signals do not reach it, with its words filled in; the config may be another by then."""
    user: str = ""
    group: str = ""
    """As whom it was started; empty for the daemon's own."""
    shared: tuple[SharedPiece, ...] = ()
    """What its processes were seen to have mapped, to be taken away when they are gone."""
    stopping: str = ""
    """Why it is being stopped; empty when it is not."""
