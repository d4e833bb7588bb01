"""What the handlers of translated dialects share."""

from __future__ import annotations

from typing import Any

import msgspec

from offloadd.proxy import routing, speech
from offloadd.proxy.lease import Lease
from offloadd.state.desired import ModelSpec

Object = dict[str, Any]


def addressed(body: Object, spec: ModelSpec, lease: Lease) -> Object:
    """The body under the name that the engine knows the model by, without our own field."""
    return {**{name: value for name, value in body.items() if name != "backend"}, "model": speech.name_for(spec, lease.host.api)}


def ruled(body: Object, spec: ModelSpec) -> Object:
    """The body with the model's `request` rules applied."""
    return routing.read_object(routing.apply_rules(spec.request, msgspec.json.encode(body))) if spec.request else body
