"""JSON Schemas of what the API takes and gives. What is passed on to engines is described as far as offloadd itself reads it."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def thing(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object; other keys are allowed, since later versions may add some."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def listed(items: Schema, **more: Any) -> Schema:
    """An array."""
    return {"type": "array", "items": items, **more}


def maybe(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
BYTES: Schema = {"type": "integer", "description": "bytes"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 100_000}
YES: Schema = {"type": "boolean"}
WALL: Schema = {"type": "number", "description": "seconds since the Unix epoch"}
SWITCH: Schema = {"enum": ["0", "1"]}
OBJECT: Schema = {"type": "object"}

ERROR = thing({"error": thing({"message": TEXT, "type": TEXT, "code": maybe(TEXT), "param": maybe(TEXT)})})
"""OpenAI's."""
ANTHROPIC_ERROR = thing({"type": {"const": "error"}, "error": thing({"type": TEXT, "message": TEXT})})
OLLAMA_ERROR = thing({"error": TEXT})
TGI_ERROR = thing({"error": TEXT, "error_type": TEXT})

_ATTEMPT = thing({"at": WALL, "ok": YES, "message": TEXT, "diagnostics": listed(OBJECT)})
_CONFIG = {"generation": WHOLE, "applied_at": WALL, "last_attempt": _ATTEMPT}
CONFIG = thing({**_CONFIG, "settings": OBJECT})
RELOADED = {"anyOf": [thing(_CONFIG), thing({"accepted": YES})]}
DIAGNOSED = thing({"ok": YES, "diagnostics": listed(OBJECT), "message": TEXT})
HEALTH = thing(
    {"status": {"enum": ["ok", "degraded"]}},
    version=TEXT,
    uptime_s=NUMBER,
    generation=WHOLE,
    config=thing(_CONFIG),
    problems=listed(thing({"what": TEXT, "since": WALL, "hint": TEXT})),
)
_SHARE = thing(
    {"instance": TEXT, "model": TEXT, "reserved_bytes": BYTES, "measured_bytes": maybe(BYTES), "peak_bytes": maybe(BYTES)}
)
_SIZES = ("total", "used", "free", "limit", "reserved", "lent", "foreign", "releasing", "room")
_DEVICE = thing(
    {
        "id": TEXT,
        "index": WHOLE,
        "name": TEXT,
        "kind": TEXT,
        **{f"{name}_bytes": BYTES for name in _SIZES},
        "utilization": maybe(NUMBER),
        "temperature_c": maybe(NUMBER),
        "instances": listed(_SHARE),
        "foreign": listed(thing({"pid": WHOLE, "name": TEXT, "bytes": maybe(BYTES)})),
    }
)
VRAM = thing({"devices": listed(_DEVICE), "totals": OBJECT, "loans": listed(OBJECT), "as_of": WALL})
_ENTRY = {"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT}
OPENAI_MODEL = thing(_ENTRY)
OPENAI_MODELS = thing({"object": {"const": "list"}, "data": listed(OPENAI_MODEL)})
_SIGNALS = thing({"running": WHOLE, "waiting": WHOLE, "kv_cache": maybe(NUMBER), "at": WALL})
_INSTANCE = thing({"instance": TEXT, "model": TEXT, "backend": TEXT, "state": TEXT, "load": WHOLE, "slots": WHOLE})
_INSTANCE["properties"]["signals"] = {
    **maybe(_SIGNALS),
    "description": "what its engine said a moment ago; asked while requests run and `/backends` or `/metrics` is read now and then",
}
_OWN = thing(
    {
        "state": TEXT,
        "reason": TEXT,
        "source": TEXT,
        "origin": {"enum": ["configured", "discovered"]},
        "served": YES,
        "usage": OBJECT,
        "aliases": listed(TEXT),
        "architecture": TEXT,
        "parameters": maybe(WHOLE),
        "quantization": TEXT,
        "context": maybe(WHOLE),
        "size_bytes": maybe(BYTES),
        "capabilities": listed(TEXT),
        "backends": listed(thing({"name": TEXT, "available": YES, "reason": TEXT, "hint": TEXT})),
        "fits": {"enum": ["now", "after eviction", "never", "unknown"]},
        "vram": thing({"estimated": maybe(BYTES), "learned": maybe(BYTES), "measured": maybe(BYTES)}),
        "instances": listed(_INSTANCE),
    }
)
MODEL = thing({**_ENTRY, "offloadd": _OWN})
MODELS = thing({"object": {"const": "list"}, "data": listed(MODEL)})
BACKEND = thing(
    {"name": TEXT, "engine": TEXT, "kind": TEXT, "version": TEXT, "available": YES, "reason": TEXT, "instances": listed(_INSTANCE)}
)
BACKENDS = thing({"backends": listed(BACKEND)})

BORROW = {
    **thing({"size": {"type": "string", "examples": ["10GiB"]}}, device=TEXT, why=TEXT, pid=maybe(WHOLE), **{"for": maybe(TEXT)}),
    "additionalProperties": False,
}
NAME: Schema = {"type": "string", "minLength": 1}
PULLED = {**thing({"source": {"type": "string", "examples": ["ORG/NAME:Q4_K_M"]}}), "additionalProperties": False}
PULL = thing(
    {
        "id": TEXT,
        "source": TEXT,
        "folder": TEXT,
        "created_at": WALL,
        "state": {"enum": ["waiting", "asking", "chosen", "downloading", "verifying", "landed", "failed", "cancelled"]},
        "file": TEXT,
        "files": listed(TEXT),
        "total_bytes": maybe(BYTES),
        "done_bytes": BYTES,
        "message": TEXT,
        "hint": TEXT,
        "paths": listed(TEXT),
    }
)
PULLS = thing({"pulls": listed(PULL)})
_MODEL = {"model": NAME}
_ROUTING: dict[str, Schema] = {"stream": YES}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_CONTENT = {"anyOf": [TEXT, listed(thing({"type": {"const": "text"}, "text": TEXT}), minItems=1)]}
_MESSAGES = listed(thing({"role": {"enum": list(_ROLES)}, "content": _CONTENT}), minItems=1)
_TURNS = listed(thing({"role": {"enum": ["user", "assistant"]}, "content": _CONTENT}), minItems=1)
_OLLAMA_MESSAGES = listed(thing({"role": {"enum": ["system", "user", "assistant", "tool"]}, "content": TEXT}))
_INPUT = {"anyOf": [NAME, listed(NAME, minItems=1)]}
NAMED = thing(_MODEL)
PLAIN = {
    "oneOf": [thing({**_MODEL, "prompt": TEXT}, **_ROUTING), thing({**_MODEL, "messages": _MESSAGES}, **_ROUTING)],
    "description": "either a prompt or messages; `backend` may name one of the model's engines; other fields go to the engine",
}
CHAT = thing({**_MODEL, "messages": _MESSAGES}, **_ROUTING)
COMPLETION = thing({**_MODEL, "prompt": {"anyOf": [TEXT, listed(TEXT, minItems=1)]}}, **_ROUTING)
EMBEDDING = thing({**_MODEL, "input": _INPUT}, **_ROUTING)
MESSAGES = thing({**_MODEL, "messages": _TURNS, "max_tokens": {"type": "integer", "minimum": 1}}, **_ROUTING)
OLLAMA_CHAT = thing({**_MODEL, "messages": _OLLAMA_MESSAGES}, stream=YES)
OLLAMA_GENERATE = thing({**_MODEL, "prompt": TEXT}, stream=YES)
OLLAMA_PULL = thing({"model": {"type": "string", "examples": ["hf.co/ORG/NAME:Q4_K_M"]}}, stream=YES)
OLLAMA_EMBEDDING = thing({**_MODEL, "prompt": NAME})
OLLAMA_EMBED = thing({**_MODEL, "input": _INPUT})
TGI = thing({"inputs": TEXT}, parameters=OBJECT, stream=YES, model=NAME)
TGI_ANSWERS = {"anyOf": [OBJECT, listed(OBJECT)]}
