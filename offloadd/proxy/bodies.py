"""A request's body as it came, and as an engine gets it: the same bytes where the config and the engine's own names allow."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from offloadd.proxy import routing, speech
from offloadd.proxy.dialects.multipart import Form, is_form
from offloadd.state.desired import ModelSpec
from offloadd.state.launch import EngineApi


@dataclass(frozen=True, slots=True)
class Body:
    """JSON, or a form with files. `head` holds the fields that decide where it goes."""

    raw: bytes
    head: routing.Head
    form: Form | None = None

    @classmethod
    def read(cls, raw: bytes, content_type: str) -> Body:
        """Look at what decides; RequestError 400 says what is wrong with it."""
        if not is_form(content_type):
            return cls(raw, routing.read_head(raw))
        form = Form(raw, content_type)
        head = routing.Head(model=form.text("model"), stream=form.text("stream") == "true", backend=form.text("backend"))
        return cls(raw, head, form)

    def ruled(self, spec: ModelSpec) -> Body:
        """With the model's `request` rules applied, which may switch a stream on or off; a form has none."""
        if self.form is not None or not spec.request:
            return self
        raw = routing.apply_rules(spec.request, self.raw)
        return Body(raw, routing.read_head(raw))

    def for_engine(self, api: EngineApi) -> bytes:
        """Under the name that the engine knows the model by, where it looks at it."""
        if self.form is None:
            return readdressed(self.raw, self.head, api)
        if not api.model or self.head.model in (None, api.model):
            return self.raw
        return self.form.replaced("model", api.model)


def readdressed(body: bytes, head: routing.Head, api: EngineApi) -> bytes:
    """The body with the name that the engine checks, and without our own field, where it checks one; else the same bytes."""
    if not api.model or (head.model == api.model and head.backend is None):
        return body
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    fields.pop("backend", None)
    return msgspec.json.encode({**fields, "model": api.model})


def check(spec: ModelSpec, api_of: speech.ApiOf, body: Body, path: str) -> None:
    """RequestError 400 when the body names an engine that is not the model's, or a path that none of its engines serves."""
    routing.check_backend(spec, body.head.backend)
    speech.check_spoken(spec, api_of, path)
