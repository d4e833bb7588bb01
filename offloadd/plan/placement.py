"""Where a model fits: on one device, divided over several, in part on a GPU, or on the CPU. Same question, same answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from offloadd.plan.accounting import pool
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
    if not need.total and not need.on_host and not need.host:
        return Placement(reserved={})  # it runs elsewhere
    if not room:
        return NoRoom(need=need.total, why=site.blind)
    gpus = _gpus(spec, site, usable)
    if isinstance(gpus, str):
        return NoRoom(need=need.total, why=gpus)
    if not gpus:
        return _on_host(need, room, site)
    found = _on_gpus(need, spec, room, gpus, site)
    return _as_found(found, need, site) if found else _short(need, spec, room, site, gpus)


def _as_found(placement: Placement, need: VramEstimate, site: Site) -> Placement:
    """For an engine that sizes itself: how large its cards are, and how full."""
    if not need.elastic:
        return placement
    views = {gpu: site.devices[gpu] for gpu in placement.gpus}
    whole, used = {gpu: view.total for gpu, view in views.items()}, {gpu: view.used for gpu, view in views.items()}
    return replace(placement, whole=whole, used=used, elastic=True)


def fits(reserved: Mapping[DeviceId, Bytes], room: Room, site: Site) -> bool:
    """Whether every device has room for its part; a memory under several names, for the sum of what is promised under each."""
    needed: dict[DeviceId, int] = {}
    for device, size in reserved.items():
        for each in pool(device, site.devices):
            needed[each] = needed.get(each, 0) + size
    return all(device in room for device in reserved) and all(room[each] >= size for each, size in needed.items() if each in room)


def room_on(device: DeviceId, room: Room, site: Site) -> Bytes:
    """What fits there: of a memory under several names, the least that any of them leaves."""
    return min((room[each] for each in pool(device, site.devices) if each in room), default=Bytes(0))


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
    return list(dict.fromkeys(view.id for view in named if view is not None))  # one card may be named by index and by UUID


def _of_one_kind(views: Sequence[DeviceView]) -> list[DeviceView]:
    """NVIDIA's where there are any, as a process uses one maker's. A processor's own graphics only if named: it is no faster."""
    kind = DeviceKind.NVIDIA if any(view.kind is DeviceKind.NVIDIA for view in views) else DeviceKind.AMD
    return [view for view in views if view.kind is kind and not (kind is DeviceKind.AMD and view.unified)]


def _named(name: str, views: Sequence[DeviceView]) -> DeviceView | None:
    return next((v for v in views if name == str(v.index) or v.id.name.startswith(name)), None)


def _on_host(need: VramEstimate, room: Room, site: Site) -> Placement | NoRoom:
    size = need.total if need.on_host is None else need.on_host
    if fits({HOST_RAM: size}, room, site):
        return Placement(reserved={HOST_RAM: size})
    if HOST_RAM not in site.accounts:
        return NoRoom(need=size)
    limit, free = room_on(HOST_RAM, site.limits, site), room_on(HOST_RAM, room, site)
    return NoRoom(need=size, device=HOST_RAM, label=site.label(HOST_RAM), room=free, limit=limit, never=size > limit)


def _on_gpus(need: VramEstimate, spec: ModelSpec, room: Room, gpus: Sequence[DeviceId], site: Site) -> Placement | None:
    """The first of the ways that fits, from the simplest to the most divided."""
    if isinstance(spec.gpu_layers, int) and need.layers:
        return _last_layers(need, min(spec.gpu_layers, len(need.layers)), room, gpus, site)
    if spec.devices == "auto" or len(gpus) == 1:
        single = _on_one(need, room, gpus, site)
        if single:
            return single
    exactly = spec.devices != "auto"
    divided = _divided(need, room, gpus, site, exactly=exactly) or _evenly(need, room, gpus, site, exactly=exactly)
    if divided or not spec.partial or not need.layers:
        return divided
    counts = range(len(need.layers) - 1, 0, -1)
    return next((found for count in counts if (found := _last_layers(need, count, room, gpus, site))), None)


def _on_one(need: VramEstimate, room: Room, gpus: Sequence[DeviceId], site: Site) -> Placement | None:
    best = _tightest(need.total, need.host, room, gpus, site)
    return None if best is None else Placement(reserved=_with_host({best: need.total}, need.host), gpus=(best,))


def _last_layers(need: VramEstimate, count: int, room: Room, gpus: Sequence[DeviceId], site: Site) -> Placement | None:
    """The last `count` layers on one GPU, the others on the CPU."""
    size = Bytes(sum(need.layers[len(need.layers) - count :]) + need.fixed)
    host = Bytes(need.host + sum(need.layers[: len(need.layers) - count]))
    best = _tightest(size, host, room, gpus, site)
    return None if best is None else Placement(reserved=_with_host({best: size}, host), gpus=(best,), split=(count,))


def _tightest(size: Bytes, host: Bytes, room: Room, gpus: Sequence[DeviceId], site: Site) -> DeviceId | None:
    """The GPU with room for `size`, and `host` beside it, that is left with the least."""
    if not _host_has(host, room):
        return None
    large = sorted((room[gpu], gpu) for gpu in gpus if room.get(gpu, -1) >= size)
    return next((gpu for _, gpu in large if fits(_with_host({gpu: size}, host), room, site)), None)


def _divided(need: VramEstimate, room: Room, gpus: Sequence[DeviceId], site: Site, *, exactly: bool) -> Placement | None:
    """Whole layers in a row on each of as few GPUs as will do, the roomiest; with `exactly`, on all of them."""
    whole = [gpu for gpu in gpus if not site.devices[gpu].slice_of]  # a process can see only one slice of a card
    if not need.layers or len(whole) < (len(gpus) if exactly else 2) or not _host_has(need.host, room):
        return None
    order = {gpu: index for index, gpu in enumerate(whole)}
    roomiest = sorted(whole, key=lambda gpu: (-room.get(gpu, 0), order[gpu]))
    capacity = list(accumulate(room.get(gpu, 0) - need.fixed for gpu in roomiest))
    wanted = sum(need.layers)
    for count in range(len(whole) if exactly else 2, len(whole) + 1):
        if capacity[count - 1] < wanted:
            continue
        chosen = sorted(roomiest[:count], key=order.__getitem__)
        counts = _share_out(need.layers, [room.get(gpu, 0) - need.fixed for gpu in chosen])
        division = _division(need, chosen, counts) if counts else None
        if division and fits(division.reserved, room, site):
            return division
    return None


def _evenly(need: VramEstimate, room: Room, gpus: Sequence[DeviceId], site: Site, *, exactly: bool) -> Placement | None:
    """The same part on each of as few GPUs as will do, the roomiest; with `exactly`, on all of them."""
    whole = [gpu for gpu in gpus if not site.devices[gpu].slice_of]
    roomiest = sorted(whole, key=lambda gpu: (-room.get(gpu, 0), gpus.index(gpu)))
    for count, size in sorted(need.even.items()):
        chosen = sorted(roomiest[:count], key=gpus.index)
        reserved = _with_host(dict.fromkeys(chosen, size), need.host)
        if len(chosen) == count and (count == len(gpus) or not exactly) and fits(reserved, room, site):
            return Placement(reserved=reserved, gpus=tuple(chosen))
    return None


def _share_out(layers: Sequence[Bytes], capacity: Sequence[int]) -> tuple[int, ...] | None:
    """How many layers in a row each device takes, in proportion to its capacity as far as whole layers allow; None without room.

    Each takes one at least. Where proportional shares don't come out even, one device is filled after another.
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
    for after, (target, most) in zip(reversed(range(len(targets))), zip(targets, capacity, strict=True), strict=True):
        size = taken = 0
        while start + taken < len(layers) - after:  # the devices after this one get a layer each at least
            layer = layers[start + taken]
            # Half a layer over the target is nearer to it than half a layer under.
            if size + layer > most or (taken and size + layer / 2 > target + debt):
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
    """What is short: RAM where a GPU would do, else the largest GPU. RAM that is not read is taken to be large enough one day."""
    limits = {HOST_RAM: Bytes(need.total + need.host), **site.limits}
    never = _on_gpus(need, spec, limits, gpus, site) is None
    free = room_on(HOST_RAM, room, site)
    if need.host > free and _on_gpus(replace(need, host=Bytes(0)), spec, room, gpus, site):
        if HOST_RAM not in site.accounts:
            return NoRoom(need=need.host, why="RAM, of which it needs a part beside the GPU, could not be read")
        limit = room_on(HOST_RAM, site.limits, site)
        return NoRoom(need=need.host, device=HOST_RAM, label=site.label(HOST_RAM), room=free, limit=limit, never=never)
    nearest = max(gpus, key=lambda gpu: (site.accounts[gpu].limit, room.get(gpu, 0)))  # the first of equals
    return NoRoom(
        need=need.total,
        device=nearest,
        label=site.label(nearest),
        room=room_on(nearest, room, site),
        limit=room_on(nearest, site.limits, site),
        never=never,
    )
