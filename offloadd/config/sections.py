"""The schema with a section for each engine's own options, made from what its adapter declares."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import Field, Strict, create_model

from offloadd.backends.base import Backend
from offloadd.config import fields
from offloadd.config.engines import builtins
from offloadd.config.schema import ConfigFile, Discovery, ModelSection, ModelSettings
from offloadd.config.section import Section
from offloadd.state.desired import BackendOptions
from offloadd.units import Bytes, Seconds


def config_model(backends: Mapping[str, Backend]) -> type[ConfigFile]:
    """`ConfigFile` for these adapters; the same ones give the same class."""
    return _config_model(tuple(sorted(backends.items())))


def to_options(section: Section, options: type[BackendOptions]) -> BackendOptions:
    """The adapter's own options from its section; what is not written keeps the adapter's default."""
    return options(**{name: getattr(section, name) for name in section.model_fields_set})


@functools.lru_cache(maxsize=16)
def _config_model(adapters: tuple[tuple[str, Backend], ...]) -> type[ConfigFile]:
    known = dict(adapters)
    sections: dict[str, Any] = {}
    for name, engine in builtins(known).items():
        sections[name] = _typed_section(engine.adapter)
    model = create_model("Model", __base__=ModelSection, __doc__=ModelSection.__doc__, **sections)
    described: Any = Field(default_factory=dict, description=_description(ConfigFile, "models"))
    models: Any = (dict[fields.ModelKey, model], described)
    found = _discovery(sections)
    discovery: Any = (found, Field(found(), description=_description(ConfigFile, "discovery")))
    return create_model("Config", __base__=ConfigFile, __doc__=ConfigFile.__doc__, models=models, discovery=discovery)


def _discovery(sections: Mapping[str, Any]) -> type[Discovery]:
    """With the engines' own options among the defaults."""
    made: Any = create_model("Defaults", __base__=ModelSettings, __doc__=ModelSettings.__doc__, **sections)
    defaults: Any = (made, Field(made(), description=_description(Discovery, "defaults")))
    return create_model("Discovery", __base__=Discovery, __doc__=Discovery.__doc__, defaults=defaults)


def _description(section: type[Section], name: str) -> str | None:
    return section.model_fields[name].description


def _typed_section(adapter: Backend) -> tuple[Any, Any]:
    docs = _attribute_docs(adapter.options)
    hints = get_type_hints(adapter.options)
    entries: dict[str, Any] = {}
    for field in dataclasses.fields(adapter.options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        entries[field.name] = (_as_written(hints[field.name]), Field(default, description=docs.get(field.name)))
    section = create_model(f"{adapter.options.__name__}Section", __base__=Section, __doc__=adapter.options.__doc__, **entries)
    return section | None, Field(None, description=f"Options of {adapter.title}.")


def _as_written(hint: Any) -> Any:
    """The adapter's type as a config spells it: sizes and times with units, tuples as lists."""
    if hint is Bytes:
        return fields.Size
    if hint is Seconds:
        return fields.Time
    if hint is str:
        return fields.Text
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        items: Any = tuple.__class_getitem__((_as_written(args[0]), ...))
        return Annotated[items, Strict(False), Field(max_length=256)]
    if type(None) in args:
        inner = tuple(_as_written(arg) for arg in args if arg is not type(None))
        return functools.reduce(lambda left, right: left | right, inner) | None
    return hint


def _attribute_docs(options: type[BackendOptions]) -> dict[str, str]:
    """Doc strings below the fields of a dataclass: Python itself keeps none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    docs: dict[str, str] = {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(str(ast.literal_eval(below.value)))
    return docs
