"""The API's description of itself."""

from __future__ import annotations

import json

import jsonschema
import pytest

from offloadd.api.openapi import description
from offloadd.api.operations import OPERATIONS


def test_it_holds_every_operation_once() -> None:
    found = description()
    listed = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    assert listed == set(OPERATIONS)
    names = [entry["operationId"] for methods in found["paths"].values() for entry in methods.values()]
    assert len(set(names)) == len(names)


def test_path_parameters_are_described() -> None:
    for path, methods in description()["paths"].items():
        for entry in methods.values():
            described = {parameter["name"] for parameter in entry["parameters"] if parameter["in"] == "path"}
            assert all(f"{{{name}}}" in path for name in described)
            assert path.count("{") == len(described)


def test_it_is_json() -> None:
    assert json.loads(json.dumps(description())) == description()


@pytest.mark.parametrize("each", OPERATIONS.values(), ids=lambda each: f"{each.method} {each.path}")
def test_schemas_are_schemas(each) -> None:
    for schema in (each.takes, *(each.query or {}).values(), *(each.gives or {}).values()):
        if schema is not None:
            jsonschema.Draft202012Validator.check_schema(schema)


def test_nothing_that_is_sent_names_a_program() -> None:
    """No operation takes a command, arguments, an environment or an address to send to, at any depth of its body."""
    forbidden = {"command", "args", "env", "argv", "url", "api_base", "base_url", "proxy", "path"}

    def names(schema: object) -> set[str]:
        if isinstance(schema, dict):
            return set(schema.get("properties", ())).union(*map(names, schema.values()))
        return set().union(*map(names, schema)) if isinstance(schema, list) else set()

    for each in OPERATIONS.values():
        assert not names(each.takes) & forbidden, each.path
