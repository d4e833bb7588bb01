"""`POST /plan`: what a posted config would change, with the ledger before and after. Nothing is changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec
from aiohttp import web

from offloadd.config import Loaded, SourceText, render_json
from offloadd.errors import RequestError
from offloadd.plan.foresee import Foresight
from offloadd.state.actions import (
    Action,
    AdoptInstance,
    DeviceAccount,
    DrainInstance,
    SleepInstance,
    StartInstance,
    StopInstance,
    StopReason,
)
from offloadd.state.desired import DesiredState, ModelSpec
from offloadd.state.ids import DeviceId, ModelName

SECTIONS = ("server", "storage", "budget", "engines", "discovery", "registry")
MAX_SOURCES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From the config in force to the posted one, and what each of them leads to from now on."""

    old: DesiredState
    new: DesiredState
    without: Foresight
    within: Foresight
    labels: Mapping[DeviceId, str]


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    text: str


class _Sources(msgspec.Struct, forbid_unknown_fields=True):
    """Several files of one config."""

    sources: list[_Source]


def plan_route(preview: Callable[[Sequence[SourceText]], Awaitable[tuple[Loaded, Change | None]]]) -> web.RouteDef:
    """The route. The body is a config's text, or `{"sources": [{"name", "text"}]}` for one in several files."""

    async def plan(request: web.Request) -> web.Response:
        loaded, change = await preview(_sources(await request.read()))
        answer: dict[str, Any] = {"ok": change is not None, "diagnostics": list(render_json(loaded.diagnostics))}
        if change is None:
            return web.json_response({**answer, "message": loaded.render()}, status=400)
        return web.json_response({**answer, **described(change)})

    return web.post("/plan", plan)


def _sources(body: bytes) -> Sequence[SourceText]:
    try:
        files = msgspec.json.decode(body, type=_Sources).sources
        if not 0 < len(files) <= MAX_SOURCES:
            raise RequestError(400, "invalid_body", f"sources: expected 1 to {MAX_SOURCES} files", param="sources")
        return [SourceText(file.name, file.text) for file in files]
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass  # then it is the text itself
    try:
        return [SourceText("posted config", body.decode())]
    except UnicodeDecodeError:
        raise RequestError(400, "invalid_body", "the body is no UTF-8 text") from None


def described(change: Change) -> dict[str, Any]:
    """The change as JSON: models that are touched, other sections, and the devices' books."""
    effects = _effects(change)
    names = sorted({*effects, *_edited(change)})
    models = [_model(change, name, effects.get(name, [])) for name in names]
    sections = [name for name in SECTIONS if getattr(change.old, name, None) != getattr(change.new, name, None)]
    return {
        "changed": bool(models or sections),
        "settled": change.within.settled,
        "sections": sections,
        "models": models,
        "devices": [_device(change, device) for device in sorted(change.labels)],
    }


def _edited(change: Change) -> Iterable[ModelName]:
    old, new = change.old.models, change.new.models
    return (name for name in {*old, *new} if old.get(name) != new.get(name))


def _effects(change: Change) -> dict[ModelName, list[Action]]:
    """What is done because of the posted config: less what would be done anyway."""
    anyway = {_gist(action) for action in change.without.actions}
    found: dict[ModelName, list[Action]] = {}
    for action in change.within.actions:
        if isinstance(action, StartInstance | DrainInstance | SleepInstance | StopInstance) and _gist(action) not in anyway:
            found.setdefault(action.instance.model, []).append(action)
    return found


def _gist(action: Action) -> object:
    if isinstance(action, StartInstance):
        return ("start", action.instance.model, action.candidate.fingerprint)
    if isinstance(action, SleepInstance):
        return ("sleep", action.instance)
    return ("end", action.instance) if isinstance(action, DrainInstance | StopInstance | AdoptInstance) else action


def _model(change: Change, name: ModelName, actions: Sequence[Action]) -> dict[str, Any]:
    old, new = change.old.models.get(name), change.new.models.get(name)
    starts = [action for action in actions if isinstance(action, StartInstance)]
    ends = [action for action in actions if isinstance(action, DrainInstance | SleepInstance | StopInstance)]
    decision = change.within.last.decisions.get(name)
    return {
        "model": name,
        "edit": "none" if old == new else "added" if old is None else "removed" if new is None else "changed",
        "fields": _fields(old, new),
        "effect": _effect(starts, ends, in_place=None not in (old, new) and old != new),
        "starts": [_start(change, action) for action in starts],
        "ends": [{"instance": str(action.instance), "why": action.why} for action in ends],
        "after": {"state": decision.state, "reason": decision.sentence} if decision else None,
    }


def _effect(
    starts: Sequence[StartInstance], ends: Sequence[DrainInstance | SleepInstance | StopInstance], *, in_place: bool
) -> str:
    if starts and ends:
        return "replace"
    if starts:
        return "start"
    if any(isinstance(action, StopInstance) and action.reason is StopReason.EVICTED for action in ends):
        return "evict"
    if ends and all(isinstance(action, SleepInstance) for action in ends):
        return "sleep"
    if any("to make room for " in action.why for action in ends):
        return "evict"
    return "stop" if ends else "in place" if in_place else "none"


def _fields(old: ModelSpec | None, new: ModelSpec | None) -> list[str]:
    if old is None or new is None:
        return []
    return [field.name for field in fields(ModelSpec) if getattr(old, field.name) != getattr(new, field.name)]


def _start(change: Change, action: StartInstance) -> dict[str, Any]:
    where = {change.labels.get(device, str(device)): size for device, size in action.placement.reserved.items()}
    return {"instance": str(action.instance), "backend": action.candidate.backend, "devices": where, "why": action.why}


def _device(change: Change, device: DeviceId) -> dict[str, Any]:
    before, after = change.within.before.get(device), change.within.last.accounts.get(device)
    return {"id": device.name, "label": change.labels[device], "before": _books(before), "after": _books(after)}


def _books(account: DeviceAccount | None) -> dict[str, int] | None:
    if account is None:
        return None
    return {"limit_bytes": account.limit, "reserved_bytes": account.reserved, "room_bytes": max(0, account.room)}
