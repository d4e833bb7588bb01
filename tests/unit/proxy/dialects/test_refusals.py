"""Engines' refusals become true ones, in each dialect's words; none of their oddities gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from offloadd.errors import RequestError
from offloadd.proxy.dialects.refusals import engine_error, event_error, shaped
from tests.unit.proxy.dialects.streams import RECORDINGS, needs_recordings, recorded

LLAMA = {
    "error-bad-grammar": (400, "invalid_request"),
    "error-context-length": (400, "context_length_exceeded"),
    "error-context-length-stream": (400, "context_length_exceeded"),
    "error-empty-body": (400, "invalid_request"),
    "error-form-content-type": (400, "invalid_request"),
    "error-huge-body-20mb": (400, "context_length_exceeded"),
    "error-image": (400, "invalid_request"),
    "error-invalid-utf8": (400, "invalid_request"),
    "error-malformed-json": (400, "invalid_request"),
    "error-max-tokens-string": (400, "invalid_request"),
    "error-n-0": (400, "invalid_request"),
    "error-unknown-path-post": (400, "unsupported_capability"),
    "error-wrong-method-delete": (400, "unsupported_capability"),
    "embeddings-error-too-long": (400, "invalid_request"),
    "embeddings-not-enabled": (400, "unsupported_capability"),
    "rerank-not-enabled": (400, "unsupported_capability"),
    "audio-transcriptions-error-multipart": (400, "unsupported_capability"),
    "messages-error-missing-messages": (400, "invalid_request"),
    "chat-completion-loading": (503, "backend_busy"),
    "apikey-wrong-chat": (502, "backend_refused_us"),
    "router-chat-nonstream-child-killed": (502, "backend_lost"),
    "router-chat-broken-model": (500, "backend_error"),
}
VLLM = {
    "error-context-length": (400, "context_length_exceeded"),
    "error-invalid-utf8": (400, "invalid_request"),
    "error-malformed-json": (400, "invalid_request"),
    "error-max-tokens-0": (400, "invalid_request"),
    "error-queue-full-503": (503, "backend_busy"),
    "error-queue-full-503-messages": (503, "backend_busy"),
    "error-unknown-model": (404, "model_not_found"),
    "error-unknown-path-post": (400, "unsupported_capability"),
    "error-wrong-method-delete": (400, "unsupported_capability"),
    "embeddings-not-supported": (400, "unsupported_capability"),
    "images-generations": (400, "unsupported_capability"),
    "messages-error-context": (400, "context_length_exceeded"),
    "messages-error-missing-max-tokens": (400, "invalid_request"),
    "messages-error-unknown-model": (404, "model_not_found"),
}
KNOWN = [("llamacpp", *item) for item in LLAMA.items()] + [("vllm", *item) for item in VLLM.items()]


@needs_recordings
@pytest.mark.parametrize(("engine", "name", "expected"), KNOWN)
def test_what_engines_really_answered(engine: str, name: str, expected: tuple[int, str]) -> None:
    status, _, body = recorded(f"{engine}/{name}.json")
    found = engine_error(status, body)
    assert (found.status, found.code) == expected
    assert found.message
    assert "json.exception" not in found.message


@needs_recordings
def test_every_recorded_refusal_is_said_in_every_dialect() -> None:
    """OpenAI's code is text, and nothing of an engine's own type is left."""
    names = [
        path
        for path in RECORDINGS.glob("*/*.json")
        if b"\nHTTP/1.1 2" not in path.read_bytes() and b"\nHTTP/1.1 " in path.read_bytes()
    ]
    assert len(names) > 80
    for path in names:
        status, _, body = recorded(str(path.relative_to(RECORDINGS)))
        found = engine_error(status, body)
        assert found.status >= 400
        error = shaped("/v1/chat/completions", found)[1]["error"]
        assert isinstance(error["code"], str)
        assert error["type"] in ("invalid_request_error", "server_error", "rate_limit_error")
        assert shaped("/v1/messages", found)[1]["type"] == "error"
        assert isinstance(shaped("/api/chat", found)[1]["error"], str)
        assert set(shaped("/generate", found)[1]) == {"error", "error_type"}


def test_numbers_of_a_context_that_is_too_short_are_kept() -> None:
    body = {
        "error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 731, "n_ctx": 512}
    }
    found = engine_error(400, json.dumps(body).encode())
    assert found.body["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
        "param": None,
        "n_prompt_tokens": 731,
        "n_ctx": 512,
    }


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            422,
            {"error": "Input validation error: `inputs` must have less than 9 tokens. Given: 10", "error_type": "validation"},
            (400, "context_length_exceeded"),
        ),
        (422, {"error": "Input validation error: `top_p` must be > 0", "error_type": "validation"}, (400, "invalid_request")),
        (424, {"error": "Request failed during generation: oh", "error_type": "generation"}, (500, "backend_error")),
        (429, {"error": "Model is overloaded", "error_type": "overloaded"}, (429, "backend_busy")),
        (401, {}, (502, "backend_refused_us")),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "Field required"}]}, (400, "invalid_request")),
        (500, "<html>oops</html>", (500, "backend_error")),
        (302, "", (500, "backend_error")),
    ],
)
def test_other_shapes(status: int, body: Any, expected: tuple[int, str]) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode() if body else b""
    found = engine_error(status, raw)
    assert (found.status, found.code) == expected
    assert "<html>" not in found.message


def test_waiting_is_passed_on() -> None:
    assert engine_error(503, b"busy", retry_after="7").headers == {"Retry-After": "7"}
    assert engine_error(503, b"busy", retry_after="Wed, 21 Oct").headers == {"Retry-After": "1"}


def test_events_that_are_errors() -> None:
    found = event_error({"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}})
    assert (found.status, found.code) == (500, "backend_error")
    assert event_error({"error": {"message": "no", "http_status_code": 422}}).status == 400
    assert event_error({"type": "error", "error": {"type": "overloaded_error", "message": "no"}}).status == 500
    assert event_error({"error": "proxy error: Failed to read connection"}).code == "backend_lost"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/messages", (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}})),
        ("/api/chat", (429, {"error": "full"})),
        ("/generate", (429, {"error": "full", "error_type": "overloaded"})),
        ("/tgi/a/generate_stream", (429, {"error": "full", "error_type": "overloaded"})),
        (
            "/v1/chat/completions",
            (429, {"error": {"message": "full", "type": "rate_limit_error", "code": "queue_full", "param": None}}),
        ),
    ],
)
def test_ours_in_each_dialect(path: str, expected: tuple[int, dict[str, Any]]) -> None:
    assert shaped(path, RequestError(429, "queue_full", "full")) == expected


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (503, "overloaded_error"),
        (502, "api_error"),
    ],
)
def test_anthropics_types(status: int, kind: str) -> None:
    assert shaped("/v1/messages", RequestError(status, "x", "x"))[1]["error"]["type"] == kind


def test_tgis_validation_has_its_status() -> None:
    assert shaped("/generate", RequestError(400, "invalid_body", "x")) == (422, {"error": "x", "error_type": "validation"})
