"""Where a model fits: on one device, divided over several, in part on a GPU, or on the CPU. Same question, same answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from offloadd.state.actions import DeviceAccount
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import HOST_RAM, DeviceId, DeviceKind
from offloadd.state.launch import Placement, VramEstimate
from offloadd.state.observed import DeviceView
from offloadd.units import Bytes, format_bytes

Room = Mapping[DeviceId, Bytes]
Kinds = frozenset[DeviceKind] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The devices that could be read, with their books. `blind` says why others that are there could not."""

    devices: Mapping[DeviceId, DeviceView]
    accounts: Mapping[DeviceId, DeviceAccount]
    blind: str = ""

    @property
    def limits(self) -> Room:
        """The room of an empty machine."""
        return {device: account.limit for device, account in self.accounts.items()}

    def label(self, device: DeviceId) -> str:
        """What people call it: `gpu0`, `host`."""
        view = self.devices.get(device)
        return str(device) if view is None or view.kind is DeviceKind.HOST else f"gpu{view.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """Why it does not fit: the need, and the device that came nearest with its books. `device` is None when none could be asked."""

    need: Bytes
    device: DeviceId | None = None
    label: str = ""
    room: Bytes = Bytes(0)
    limit: Bytes = Bytes(0)
    never: bool = False
    """True when it would not fit on an empty machine either."""
    why: str = ""
    """Why no device could be asked."""

    @property
    def sentence(self) -> str:
        """The arithmetic, as an operator would say it."""
        need = f"needs {format_bytes(self.need)}"
        if self.device is None:
            return f"{need}, and {self.why or 'no device could be read'}"
        if self.never:
            return f"{need} on {self.label}, more than its limit of {format_bytes(self.limit)}"
        return f"{need} on {self.label}, {format_bytes(max(0, self.room))} free"


def place(need: VramEstimate, spec: ModelSpec, room: Room, site: Site, usable: Kinds = None) -> Placement | NoRoom:
    """The best place for one instance in this room, or what is short.

    GPUs where there are any, the CPU where there are none or where the config asks for it. One device where one suffices, the one
    that is left with the least room; then as few as possible, each with a share of the layers; then, with `partial`, as many layers
    on one GPU as fit. `usable` are the kinds of GPUs that the engine can use, None when that is not known.
    """
    if not room:
        return NoRoom(need=need.total, why=site.blind)
    gpus = _gpus(spec, site, usable)
    if isinstance(gpus, str):
        return NoRoom(need=need.total, why=gpus)
    if not gpus:
        return _on_host(need, room, site)
    found = _on_gpus(need, spec, room, gpus, site)
    return found or _short(need, spec, room, site, gpus)


def _gpus(spec: ModelSpec, site: Site, usable: Kinds) -> Sequence[DeviceId] | str:
    """GPUs that the model may use, by index, none when it is the CPU's; or why that cannot be said now."""
    if spec.devices == "cpu" or spec.gpu_layers == 0 or usable == frozenset():
        return ()
    views = [v for v in site.devices.values() if v.kind is not DeviceKind.HOST and (usable is None or v.kind in usable)]
    views.sort(key=lambda v: (v.index, v.id))
    if spec.devices == "auto":
        return site.blind or [view.id for view in _of_one_kind(views)]
    named = [_named(name, views) for name in spec.devices]
    missing = [name for name, view in zip(spec.devices, named, strict=True) if view is None]
    if missing:
        return site.blind or f"there is no device {', '.join(missing)}"
    return [view.id for view in named if view is not None]


def _of_one_kind(views: Sequence[DeviceView]) -> list[DeviceView]:
    """NVIDIA's where there are any, as a process uses one maker's. A processor's own graphics only if named: it is no faster."""
    kind = DeviceKind.NVIDIA if any(view.kind is DeviceKind.NVIDIA for view in views) else DeviceKind.AMD
    return [view for view in views if view.kind is kind and not (kind is DeviceKind.AMD and view.unified)]


def _named(name: str, views: Sequence[DeviceView]) -> DeviceView | None:
    return next((v for v in views if name == str(v.index) or v.id.name.startswith(name)), None)


def _on_host(need: VramEstimate, room: Room, site: Site) -> Placement | NoRoom:
    size = need.total if need.on_host is None else need.on_host
    if HOST_RAM in room and room[HOST_RAM] >= size:
        return Placement(reserved={HOST_RAM: size})
    account = site.accounts.get(HOST_RAM)
    if account is None:
        return NoRoom(need=size)
    limit, free = account.limit, room.get(HOST_RAM, Bytes(0))
    return NoRoom(need=size, device=HOST_RAM, label=site.label(HOST_RAM), room=free, limit=limit, never=size > limit)


def _on_gpus(need: VramEstimate, spec: ModelSpec, room: Room, gpus: Sequence[DeviceId], site: Site) -> Placement | None:
    """The first of the ways that fits, from the simplest to the most divided."""
    if isinstance(spec.gpu_layers, int) and need.layers:
        return _last_layers(need, min(spec.gpu_layers, len(need.layers)), room, gpus)
    if spec.devices == "auto" or len(gpus) == 1:
        single = _on_one(need, room, gpus)
        if single:
            return single
    divided = _divided(need, room, _whole(gpus, site), exactly=spec.devices != "auto")
    if divided or not spec.partial or not need.layers:
        return divided
    counts = range(len(need.layers) - 1, 0, -1)
    return next((found for count in counts if (found := _last_layers(need, count, room, gpus))), None)


def _whole(gpus: Sequence[DeviceId], site: Site) -> Sequence[DeviceId]:
    """Those that are no slice of a card: a process can see only one slice."""
    return [gpu for gpu in gpus if not site.devices[gpu].slice_of]


def _on_one(need: VramEstimate, room: Room, gpus: Sequence[DeviceId]) -> Placement | None:
    if not _host_has(need.host, room):
        return None
    fitting = [(room.get(gpu, Bytes(0)), gpu) for gpu in gpus if room.get(gpu, 0) >= need.total]
    if not fitting:
        return None
    best = min(fitting)[1]
    return Placement(reserved=_with_host({best: need.total}, need.host), gpus=(best,))


def _last_layers(need: VramEstimate, count: int, room: Room, gpus: Sequence[DeviceId]) -> Placement | None:
    """The last `count` layers on one GPU, the others on the CPU."""
    size = Bytes(sum(need.layers[len(need.layers) - count :]) + need.fixed)
    host = Bytes(need.host + sum(need.layers[: len(need.layers) - count]))
    fitting = [(room.get(gpu, Bytes(0)), gpu) for gpu in gpus if room.get(gpu, 0) >= size]
    if not fitting or not _host_has(host, room):
        return None
    best = min(fitting)[1]
    return Placement(reserved=_with_host({best: size}, host), gpus=(best,), split=(count,))


def _divided(need: VramEstimate, room: Room, gpus: Sequence[DeviceId], *, exactly: bool) -> Placement | None:
    """Whole layers in a row on each of as few GPUs as will do, the roomiest; with `exactly`, on all of them."""
    if not need.layers or len(gpus) < 2 or not _host_has(need.host, room):
        return None
    order = {gpu: index for index, gpu in enumerate(gpus)}
    roomiest = sorted(gpus, key=lambda gpu: (-room.get(gpu, 0), order[gpu]))
    capacity = list(accumulate(room.get(gpu, 0) - need.fixed for gpu in roomiest))
    wanted = sum(need.layers)
    for count in range(len(gpus) if exactly else 2, len(gpus) + 1):
        if capacity[count - 1] < wanted:
            continue
        chosen = sorted(roomiest[:count], key=order.__getitem__)
        counts = _share_out(need.layers, [room.get(gpu, 0) - need.fixed for gpu in chosen])
        if counts:
            return _division(need, chosen, counts)
    return None


def _share_out(layers: Sequence[Bytes], capacity: Sequence[int]) -> tuple[int, ...] | None:
    """How many layers in a row each device takes, in proportion to its capacity as far as whole layers allow; None without room.

    A device that a proportional share would leave empty or over-full makes the division fall back to filling one after another.
    """
    total, room = sum(layers), sum(capacity)
    if min(capacity) <= 0 or total > room:
        return None
    for scale in (total / room, 1.0):
        counts = _fill(layers, [size * scale for size in capacity], capacity)
        if sum(counts) == len(layers) and all(counts):
            return tuple(counts)
    return None


def _fill(layers: Sequence[Bytes], targets: Sequence[float], capacity: Sequence[int]) -> list[int]:
    counts: list[int] = []
    start = 0
    debt = 0.0
    for target, most in zip(targets, capacity, strict=True):
        size = taken = 0
        while start + taken < len(layers):
            layer = layers[start + taken]
            # Half a layer over the target is nearer to it than half a layer under.
            if size + layer > most or size + layer / 2 > target + debt:
                break
            size += layer
            taken += 1
        debt += target - size
        counts.append(taken)
        start += taken
    return counts


def _division(need: VramEstimate, gpus: Sequence[DeviceId], counts: Sequence[int]) -> Placement:
    reserved: dict[DeviceId, Bytes] = {}
    start = 0
    for gpu, count in zip(gpus, counts, strict=True):
        reserved[gpu] = Bytes(need.fixed + sum(need.layers[start : start + count]))
        start += count
    return Placement(reserved=_with_host(reserved, need.host), gpus=tuple(gpus), split=tuple(counts))


def _host_has(size: Bytes, room: Room) -> bool:
    return not size or room.get(HOST_RAM, Bytes(0)) >= size


def _with_host(reserved: dict[DeviceId, Bytes], host: Bytes) -> dict[DeviceId, Bytes]:
    return {**reserved, HOST_RAM: host} if host else reserved


def _short(need: VramEstimate, spec: ModelSpec, room: Room, site: Site, gpus: Sequence[DeviceId]) -> NoRoom:
    nearest = max(gpus, key=lambda gpu: (site.accounts[gpu].limit, room.get(gpu, 0)))  # the first of equals
    return NoRoom(
        need=need.total,
        device=nearest,
        label=site.label(nearest),
        room=room.get(nearest, Bytes(0)),
        limit=site.accounts[nearest].limit,
        never=_on_gpus(need, spec, site.limits, gpus, site) is None,
    )
