"""The published JSON Schema of the config file, for editors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from offloadd.backends.base import Backend
from offloadd.config.sections import config_model


def json_schema(backends: Mapping[str, Backend]) -> dict[str, Any]:
    """Draft 2020-12, of the file as its author writes it, with each field's description, default and bounds."""
    schema = config_model(backends).model_json_schema(mode="validation", schema_generator=_Generator)
    _close(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "offloadd.yaml"}


class _Generator(GenerateJsonSchema):
    """Writes defaults as an author would (`10m`), which the library does for what it puts out, not for what it takes in."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """The library's hook for a field with a default."""
        written = super().default_schema(schema)
        writer: Any = schema["schema"].get("serialization", {})
        if writer.get("type") == "function-plain" and "default" in written:
            written["default"] = writer["function"](schema["default"])
        return written


def _close(schema: Any) -> None:
    """Where keys have a pattern, no other key is allowed: the library leaves that open."""
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _close(part)
