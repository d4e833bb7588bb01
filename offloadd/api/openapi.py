"""`GET /openapi.json`: the API's own description, made from the table of operations."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from offloadd import __version__
from offloadd.api import shapes
from offloadd.api.operations import JSON, OPERATIONS, Operation
from offloadd.state.access import Scope

_ERRORS = {"anthropic": "AnthropicError", "ollama": "OllamaError", "tgi": "TgiError"}
_PARAMETER = re.compile(r"\{(\w+)\}")


@functools.cache
def description() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS.values():
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "offloadd",
            "version": __version__,
            "summary": "Owns the LLM server processes of a GPU machine, and proxies inference to them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://127.0.0.1:9000"}],
        "tags": [{"name": name} for name in sorted({each.tag for each in OPERATIONS.values()})],
        "paths": paths,
        "components": {
            "schemas": {
                "Error": shapes.ERROR,
                "AnthropicError": shapes.ANTHROPIC_ERROR,
                "OllamaError": shapes.OLLAMA_ERROR,
                "TgiError": shapes.TGI_ERROR,
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _operation(each: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": _identifier(each),
        "summary": each.says,
        "tags": [each.tag],
        "parameters": list(_parameters(each)),
        "responses": _responses(each),
        "x-offloadd-scope": each.scope.value,
    }
    if each.scope is not Scope.OPEN:
        found["security"] = [{"bearer": []}, {"header": []}, {}]  # the last: a server without keys asks for none
    if each.takes is not None:
        media = "multipart/form-data" if each.uploads else JSON
        found["requestBody"] = {"required": True, "content": {media: {"schema": each.takes}}}
    return found


def _identifier(each: Operation) -> str:
    words = re.sub(r"[^a-zA-Z0-9]+", "_", each.path).strip("_") or "root"
    return f"{each.method.lower()}_{words}"


def _parameters(each: Operation) -> Iterable[dict[str, Any]]:
    for name in _PARAMETER.findall(each.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    for name, schema in (each.query or {}).items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _responses(each: Operation) -> dict[str, Any]:
    content = {media: {} if schema is None else {"schema": schema} for media, schema in (each.gives or {}).items()}
    found: dict[str, Any] = {str(status): {"description": "as asked", "content": content} for status in each.good}
    if each.path == "/health":
        found["503"] = {"description": "the scheduler does not progress", "content": content}
    told = {"/reload": shapes.RELOADED, "/plan": shapes.DIAGNOSED}.get(each.path)
    if told is not None:
        refused = {"anyOf": [told, shapes.ERROR]}
        found["400"] = {
            "description": "the config was refused; the one before it is in force",
            "content": {JSON: {"schema": refused}},
        }
    error = {"$ref": f"#/components/schemas/{_ERRORS.get(each.tag, 'Error')}"}
    found["default"] = {"description": "refused or failed: the message says why", "content": {JSON: {"schema": error}}}
    return found
