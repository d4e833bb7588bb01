"""The published schema, and what keeps it true."""

from dataclasses import dataclass

import jsonschema

from offloadd.backends import discover
from offloadd.backends.llamacpp import LlamaCpp
from offloadd.config import SourceText, SystemSecrets, json_schema, load
from offloadd.state.desired import BackendOptions
from offloadd.units import Bytes, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions(BackendOptions):
    """Options of a new engine."""

    cache: Bytes = Bytes(2**20)
    """How much it keeps."""
    patience: Seconds | None = None
    """How long it waits."""


class Sglang(LlamaCpp):
    name = "sglang"
    title = "SGLang"
    options = SglangOptions
    preference = 4


def properties(schema):
    for name, section in schema["$defs"].items():
        for field, details in section.get("properties", {}).items():
            # A field described in the very words of its section has only the reference.
            target = schema["$defs"].get(details.get("$ref", "").rpartition("/")[2], {})
            yield f"{name}.{field}", {**target, **details}


def test_every_field_is_described():
    schema = json_schema(discover())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert [name for name, details in properties(schema) if not details.get("description")] == []


def test_defaults_are_written_as_an_author_would():
    schema = json_schema(discover())
    details = dict(properties(schema))
    assert details["Model.idle_timeout"]["default"] == "10m"
    assert details["GpuBudget.reserve"]["default"] == "512MiB"
    assert details["LlamaCppOptionsSection.cache_ram"]["default"] == "512MiB"
    assert details["HostBudget.limit"]["default"] == "80%"
    assert details["Model.run"]["default"] == "on-demand"


def test_a_new_adapter_brings_its_own_section():
    backends = {**discover(), "sglang": Sglang()}
    assert json_schema(backends)["$defs"]["SglangOptionsSection"]["properties"]["cache"]["description"] == "How much it keeps."
    text = "models: {m: {source: m.gguf, backends: [sglang], sglang: {cache: 2MiB, patience: 3s}}}"
    loaded = load([SourceText("x", text)], backends=backends, secrets=SystemSecrets())
    assert loaded.diagnostics == ()
    assert loaded.desired.models["m"].options == {"sglang": SglangOptions(cache=Bytes(2**21), patience=Seconds(3))}
