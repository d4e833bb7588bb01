"""Errors: what an engine meant by its refusal, and how each dialect says one. No engine's own oddity reaches a client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from offloadd.errors import RequestError
from offloadd.units import Seconds

Object = dict[str, Any]

_BRIEFLY = 500
_NUMBERS = ("n_prompt_tokens", "n_ctx")
_TOO_LONG = re.compile(
    r"exceed_context_size|maximum context length|context size|context window|`max_new_tokens` must be <=|must have less than",
    re.IGNORECASE,
)
_CLIENTS_FAULT = re.compile(
    r"parse error|\[json\.exception|is required|must be|not supported|too large to process|invalid|failed to parse|expected",
    re.IGNORECASE,
)
"""llama-server answers 500 to much that is wrong with the request."""
_INTERNAL = re.compile(r"\[json\.exception\.\w+\.\d+\] ")
_NO_SUCH_PATH = frozenset({"not found", "file not found", "method not allowed", ""})
_CANNOT = re.compile(r"does not support|not enabled|no such endpoint", re.IGNORECASE)
_WAIT_DIGITS = 7
"""Of a `Retry-After` in seconds; more are no time that anybody waits."""
_LOST = re.compile(r"^proxy error\b", re.IGNORECASE)
"""What a llama-server in router mode writes, bare, when the process behind it has died."""


def engine_error(status: int, body: bytes, path: str = "", retry_after: str = "") -> RequestError:
    """An engine's refusal, whatever its shape, as one of ours: a status that is true, a sentence, and no internals."""
    message, kind, param, more = _read(body)
    found = _INTERNAL.sub("", message)[:_BRIEFLY] or f"the engine answered {status} without a word"
    wait = Seconds(float(retry_after)) if retry_after.isdecimal() and len(retry_after) <= _WAIT_DIGITS else None
    if _LOST.search(message):
        return RequestError(502, "backend_lost", f"the server behind the engine was lost: {found}", retry_after=Seconds(1))
    if status in (401, 403):
        return RequestError(502, "backend_refused_us", f"the engine does not accept offloadd's own credentials: {found}")
    if _TOO_LONG.search(kind) or (_TOO_LONG.search(message) and status < 500):
        return RequestError(400, "context_length_exceeded", found, param=param, more=more)
    if status == 501 or (status in (404, 405) and message.strip().lower() in _NO_SUCH_PATH):
        what = f"{path} is not served by this engine: {found}" if path else found
        return RequestError(400, "unsupported_capability", what, param="model")
    if status in (429, 503):
        return RequestError(status, "backend_busy", found, retry_after=wait or Seconds(1))
    true = _true_status(status, message)
    return RequestError(true, _code(true), found, param=param, more=more)


def event_error(event: Mapping[str, Any]) -> RequestError:
    """An error event of a stream that has begun, as one of ours."""
    error = event.get("error")
    status = 0
    if isinstance(error, dict):
        status = next((v for k in ("code", "http_status_code") if isinstance(v := error.get(k), int)), 0)
    return engine_error(status if 400 <= status < 600 else 500, msgspec.json.encode(event))


def _true_status(status: int, message: str) -> int:
    if status == 500 and _CLIENTS_FAULT.search(message):
        return 400
    if status == 422:
        return 400
    if status == 424 or not 400 <= status < 600:
        return 500
    return status


def _code(status: int) -> str:
    if status == 404:
        return "model_not_found"
    return "backend_error" if status >= 500 else "invalid_request"


def _read(body: bytes) -> tuple[str, str, str | None, Mapping[str, object]]:
    """Message, type, parameter and numbers of an error body in any of the engines' shapes."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _plain(body), "", None, {}
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or ""
        param = error.get("param")
        numbers = {name: error[name] for name in _NUMBERS if isinstance(error.get(name), int)}
        return _text(message), _text(error.get("type") or ""), param if isinstance(param, str) else None, numbers
    kind = found.get("error_type", "") if isinstance(found, dict) else ""
    return _text(error), _text(kind), None, {}


def _text(value: object) -> str:
    """A message that is text already, or the first of a framework's list of complaints."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ": ".join(str(value[0][key]) for key in ("loc", "msg") if key in value[0])
    return msgspec.json.encode(value).decode()


def _plain(body: bytes) -> str:
    """An error that is not JSON: its text, or nothing when it is a page."""
    text = body[: 4 * _BRIEFLY].decode(errors="replace").strip()
    return "" if text.startswith("<") else text


# --- how each dialect says it ---

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_TGI = {
    400: (422, "validation"),
    422: (422, "validation"),
    429: (429, "overloaded"),
    503: (503, "overloaded"),
    500: (424, "generation"),
    502: (502, "generation"),
}
_TGI_PATHS = frozenset({"/", "/generate", "/generate_stream", "/info", "/invocations"})


def anthropic_body(error: RequestError) -> Object:
    """`{"type": "error", "error": {"type", "message"}}`."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def ollama_body(error: RequestError) -> Object:
    """`{"error": "…"}`."""
    return {"error": error.message}


def tgi_body(error: RequestError) -> Object:
    """`{"error": "…", "error_type": "…"}`."""
    _, kind = _TGI.get(error.status, (error.status, error.code))
    return {"error": error.message, "error_type": kind}


def shaped(path: str, error: RequestError) -> tuple[int, Object]:
    """Status and body of a refusal, as the clients of this path expect it."""
    if path.startswith("/v1/messages"):
        return error.status, anthropic_body(error)
    if path.startswith("/api/"):
        return error.status, ollama_body(error)
    if path in _TGI_PATHS or path.startswith("/tgi/"):
        return _TGI.get(error.status, (error.status, ""))[0], tgi_body(error)
    return error.status, error.body
