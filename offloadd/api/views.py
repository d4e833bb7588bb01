"""State to JSON: one pure function per answer of the contract's §3. Sizes in bytes, times in Unix seconds, spans in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offloadd import __version__
from offloadd.api.picture import ConfigStatus, Picture
from offloadd.plan.accounting import limit_of
from offloadd.plan.placement import NoRoom, Site, place
from offloadd.state.actions import Decision, DeviceAccount, ModelState
from offloadd.state.demand import Loan
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import DeviceId
from offloadd.state.launch import Candidate, Placement
from offloadd.state.observed import LEAVING, DeviceView, ExitRecord, InstanceView
from offloadd.state.shape import ModelShape

Json = dict[str, Any]


def health(picture: Picture) -> Json:
    """`GET /health`: `ok`, or `degraded` with the problems."""
    problems = [{"what": p.what, "since": p.since, "hint": p.hint} for p in picture.problems]
    return {
        "status": "degraded" if problems or not picture.alive else "ok",
        "version": __version__,
        "uptime_s": round(picture.wall - picture.started_wall, 3),
        "generation": picture.config.generation,
        "config": config_status(picture.config),
        "problems": problems,
    }


def config_status(config: ConfigStatus) -> Json:
    """The outcome of the last attempt to apply a config."""
    return {
        "generation": config.generation,
        "applied_at": config.applied_wall,
        "last_attempt": {
            "at": config.attempt_wall,
            "ok": config.attempt_ok,
            "message": config.message,
            "diagnostics": list(config.diagnostics),
        },
    }


def config(picture: Picture) -> Json:
    """`GET /config`: the applied config as written, without secrets, and the last attempt."""
    return {**config_status(picture.config), "settings": picture.config.shown}


def vram_status(picture: Picture) -> Json:
    """`GET /vram/status`: the ledger, device by device."""
    views = sorted(picture.observed.devices.values(), key=lambda view: (view.kind, view.index))
    devices = [_device(picture, view) for view in views]
    summed = ("total", "used", "free", "limit", "reserved", "lent", "releasing", "room")
    totals = {f"{key}_bytes": sum(device[f"{key}_bytes"] for device in devices) for key in summed}
    loans = [_loan(picture, loan) for loan in picture.demand.loans.values()]
    return {"devices": devices, "totals": totals, "loans": loans, "as_of": picture.wall}


def _loan(picture: Picture, loan: Loan) -> Json:
    granted = None if loan.granted is None else {str(device): size for device, size in loan.granted.items()}
    return {
        "loan": loan.id,
        "size_bytes": loan.size,
        "since": picture.wall_of(loan.since),
        "why": loan.why,
        "granted": granted,
        "reason": picture.plan.loans.get(loan.id, ""),
    }


def openai_models(picture: Picture) -> Json:
    """`GET /v1/models`: OpenAI's list, and nothing else."""
    return {"object": "list", "data": [openai_model(picture, spec) for spec in picture.desired.models.values()]}


def openai_model(picture: Picture, spec: ModelSpec) -> Json:
    """One entry of OpenAI's list."""
    return {"id": spec.name, "object": "model", "created": int(picture.config.applied_wall), "owned_by": "offloadd"}


def model(picture: Picture, spec: ModelSpec) -> Json:
    """`GET /models/{name}`."""
    decision = picture.plan.decisions.get(spec.name)
    candidates = picture.observed.candidates.get(spec.name, ())
    views = [view for view in picture.observed.instances.values() if view.model == spec.name]
    waiting = picture.demand.waiting.get(spec.name)
    exits = picture.observed.exits.get(spec.name, ())
    own: Json = {
        "state": decision.state if decision else ModelState.OFF,
        "reason": decision.sentence if decision else "not planned yet",
        "hint": decision.hint if decision else "",
        "retry_at": retry_at(picture, decision),
        "ready_in_s": decision.ready_in if decision else None,
        "by_hand": by_hand(picture, decision),
        "source": spec.source,
        "origin": spec.origin,
        "served": True,
        "run": spec.run,
        "aliases": list(spec.aliases),
        **shape(next((c.facts.shape for c in candidates if c.facts.shape is not None), None)),
        "context": spec.context,
        "parallel": spec.parallel,
        "size_bytes": next((c.facts.size for c in candidates if c.facts.size is not None), None),
        "backends": [{**_offer(c, decision), "fits": _fits(picture, spec, [c])} for c in candidates],
        "fits": _fits(picture, spec, candidates),
        "vram": _vram(candidates, views),
        "waiting": waiting.count if waiting else 0,
        "instances": [instance(picture, view) for view in views],
        "last_exit": _exit(picture, exits[-1]) if exits else None,
    }
    return {**openai_model(picture, spec), "offloadd": own}


def backends(picture: Picture) -> Json:
    """`GET /backends`."""
    return {"backends": [backend(picture, engine) for engine in picture.desired.engines.values()]}


def backend(picture: Picture, engine: Engine) -> Json:
    """`GET /backends/{name}`: an engine, whether it can be started here, and its instances with their load."""
    view = picture.observed.engines.get(engine.name)
    own = [v for v in picture.observed.instances.values() if v.backend == engine.name]
    served = [spec for spec in picture.desired.models.values() if engine.name in spec.backends]
    waiting = [picture.demand.waiting[spec.name].count for spec in served if spec.name in picture.demand.waiting]
    return {
        "name": engine.name,
        "engine": engine.adapter,
        "kind": engine.kind,
        "version": view.version if view else "",
        "path": view.path if view else "",
        "available": bool(view and not view.problem),
        "reason": view.problem if view else "not looked for yet",
        "hint": view.hint if view else "",
        "preference": engine.preference,
        "instances": [instance(picture, v) for v in own],
        "load": sum(picture.demand.leases.get(v.id, 0) for v in own),
        "queue": sum(waiting),
    }


def instance(picture: Picture, view: InstanceView) -> Json:
    """One instance, as it appears under a model and under an engine."""
    return {
        "instance": str(view.id),
        "model": view.model,
        "backend": view.backend,
        "state": view.state,
        "since": picture.wall_of(view.since),
        "started_at": picture.wall_of(view.started_at),
        "ready_at": None if view.ready_at is None else picture.wall_of(view.ready_at),
        "pid": view.pid,
        "port": view.endpoint.port if view.endpoint else None,
        "adopted_at": None if view.adopted_at is None else picture.wall_of(view.adopted_at),
        "ejected": view.ejected,
        "fault": view.fault,
        "load": picture.demand.leases.get(view.id, 0),
        "slots": view.spec.parallel,
        "signals": signals(picture, view),
        "reserved_bytes": view.placement.total,
        "awake_bytes": (view.awake or view.placement).total,
        "fingerprint": view.fingerprint,
    }


def signals(picture: Picture, view: InstanceView) -> Json | None:
    """What its engine said a moment ago, others' requests included; None where it was not asked or does not tell."""
    told = picture.signals.get(view.id)
    if told is None:
        return None
    return {"running": told.running, "waiting": told.waiting, "kv_cache": told.cache, "at": picture.wall_of(told.at)}


def _device(picture: Picture, view: DeviceView) -> Json:
    account = picture.plan.accounts.get(view.id) or _empty_account(picture, view)
    held = [v for v in picture.observed.instances.values() if view.id in v.placement.reserved]
    ours = sum(v.measured.get(view.id, 0) + v.unreleased.get(view.id, 0) for v in held)
    ours += sum(loan.measured.get(view.id, 0) for loan in picture.demand.loans.values() if view.id in (loan.granted or {}))
    return {
        "id": view.id.name,
        "index": view.index,
        "name": view.name,
        "kind": view.kind,
        "total_bytes": view.total,
        "used_bytes": view.used,
        "free_bytes": view.free,
        "limit_bytes": account.limit,
        "reserved_bytes": account.reserved,
        "lent_bytes": account.lent,
        "foreign_bytes": max(0, view.used - ours),
        "releasing_bytes": account.releasing,
        "room_bytes": max(0, account.room),
        "utilization": view.utilization,
        "temperature_c": view.temperature,
        "power_w": view.power_w,
        "unified": view.unified,
        "instances": [_share(v, view.id) for v in held],
        "foreign": [{"pid": p.pid, "name": p.name, "bytes": p.size} for p in picture.observed.foreign.get(view.id, ())],
    }


def _empty_account(picture: Picture, view: DeviceView) -> DeviceAccount:
    limit = limit_of(view, picture.desired.budget)
    zero = type(limit)(0)
    return DeviceAccount(
        device=view.id, limit=limit, reserved=zero, untaken=zero, releasing=zero, free=view.free, room=min(limit, view.free)
    )


def _share(view: InstanceView, device: DeviceId) -> Json:
    return {
        "instance": str(view.id),
        "model": view.model,
        "reserved_bytes": view.placement.reserved[device],
        "measured_bytes": view.measured.get(device),
        "peak_bytes": view.peak.get(device),
    }


def _offer(candidate: Candidate, decision: Decision | None) -> Json:
    problem = candidate.problem or (decision.engines.get(candidate.backend, "") if decision else "")
    return {"name": candidate.backend, "available": not candidate.problem, "reason": problem, "hint": candidate.hint}


def _fits(picture: Picture, spec: ModelSpec, candidates: Sequence[Candidate]) -> str:
    """`now`, `after eviction` or `never`; `unknown` while no engine's need is known, or no device that it may use."""
    accounts = picture.plan.accounts
    devices = {device: view for device, view in picture.observed.devices.items() if device in accounts}
    site = Site(devices=devices, accounts=accounts, blind=picture.observed.blind)
    room = {device: accounts[device].room for device in devices}
    answers = [place(c.estimate, spec, room, site, c.gpus) for c in candidates if c.estimate is not None]
    if any(isinstance(answer, Placement) for answer in answers):
        return "now"
    asked = [answer for answer in answers if isinstance(answer, NoRoom) and answer.device is not None]
    if not asked:
        return "unknown"
    return "never" if all(answer.never for answer in asked) else "after eviction"


def shape(of: ModelShape | None) -> Json:
    """What a model's file says of itself; empty where it could not be read."""
    return {
        "architecture": of.architecture if of else "",
        "parameters": of.parameters if of else None,
        "quantization": of.quantization if of else "",
        "context_train": of.context_train if of else None,
        "capabilities": list(of.capabilities) if of else [],
        "license": of.license if of else "",
    }


def _vram(candidates: Sequence[Candidate], views: Sequence[InstanceView]) -> Json:
    estimate = next((c.estimate for c in candidates if c.estimate is not None), None)
    measured = [sum(v.measured.values()) for v in views if v.measured and v.state not in LEAVING]
    return {
        "estimated": (estimate.estimated or estimate.total) if estimate else None,
        "basis": estimate.basis if estimate else "",
        "learned": estimate.total if estimate and estimate.learned else None,
        "measured": max(measured) if measured else None,
    }


def retry_at(picture: Picture, decision: Decision | None) -> float | None:
    """When a start will next be tried, in Unix seconds."""
    return picture.wall_of(decision.retry_at) if decision and decision.retry_at is not None else None


def by_hand(picture: Picture, decision: Decision | None) -> Json | None:
    """What an operator asked for; it lasts until the config is applied again."""
    wish = decision.wish if decision else None
    if wish is None:
        return None
    return {"asked": "load" if wish.load else "unload", "since": picture.wall_of(wish.since)}


def _exit(picture: Picture, record: ExitRecord) -> Json:
    return {
        "instance": str(record.instance),
        "at": picture.wall_of(record.at),
        "status": str(record.status),
        "kind": record.cause.kind,
        "message": record.cause.message,
        "hint": record.cause.hint,
        "expected": record.expected,
        "ready_for_s": record.ready_for,
        "log_tail": list(record.tail[-20:]) if not record.expected else [],
    }
