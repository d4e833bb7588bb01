"""What the validation library found, in our own short sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offloadd.config.diagnostics import did_you_mean
from offloadd.config.fields import EXPECTED, REFUSED
from offloadd.config.nodes import Node

Context = Mapping[str, Any]

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def describe(node: Node) -> str:
    """A value as it was written, with its kind: `text "8192"`, `the number 5`, `a list`."""
    value = node.value
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f'text "{value[:60]}{"…" if len(value) > 60 else ""}"'
    return ("a" if value else "an empty") + (" list" if isinstance(value, list) else " mapping")


def sentence(kind: str, context: Context, fallback: str, node: Node, found: str) -> tuple[str, str]:
    """(message, hint) for one finding; `found` says what stands there, or is empty where that must not be said."""
    wanted = context.get("what") if kind == EXPECTED else _KINDS.get(kind)
    if wanted:
        return f"expected {wanted}{_not(found)}", _type_hint(str(wanted), node, secret=not found)
    if kind == REFUSED:
        return str(context["problem"]), str(context["hint"])
    worded = _WORDED.get(kind)
    return worded(context, found) if worded else (fallback, "")


def _not(found: str) -> str:
    return f", not {found}" if found else ""


def _type_hint(wanted: str, node: Node, *, secret: bool) -> str:
    value = node.value
    if wanted == "a mapping" and value is None:
        return "is what belongs to it indented below it?"
    if wanted == "text" and isinstance(value, bool | int | float):
        return "put it in quotes"
    if wanted == "a list" and isinstance(value, str):
        return "write a list, even of one" if secret or len(value) > 60 else f'write ["{value}"]'
    if wanted == "a whole number" and isinstance(value, str) and value.lstrip("-").isdigit():
        return "remove the quotes"
    if wanted == "true or false" and isinstance(value, str):
        return {"yes": "write true", "on": "write true", "no": "write false", "off": "write false"}.get(value.lower(), "")
    return ""


def _one_of(context: Context, found: str) -> tuple[str, str]:
    choices = str(context["expected"]).replace("'", "")
    near = did_you_mean(found.removeprefix('text "').removesuffix('"'), choices.replace(" or ", ", ").split(", "))
    return f"expected {choices}{_not(found)}{near}", ""


def _bound(word: str, key: str) -> Callable[[Context, str], tuple[str, str]]:
    return lambda context, found: (f"must be {word} {context[key]:,}{_not(found.removeprefix('the number '))}", "")


def _length(word: str, key: str, unit: str) -> Callable[[Context, str], tuple[str, str]]:
    def worded(context: Context, _: str) -> tuple[str, str]:
        number = context[key]
        plural = unit if number == 1 else unit.replace("entry", "entrie") + "s"
        return f"needs {word} {number:,} {plural}", ""

    return worded


_WORDED: Mapping[str, Callable[[Context, str], tuple[str, str]]] = {
    "literal_error": _one_of,
    "enum": _one_of,
    "greater_than_equal": _bound("at least", "ge"),
    "less_than_equal": _bound("at most", "le"),
    "string_too_long": _length("at most", "max_length", "character"),
    "string_too_short": _length("at least", "min_length", "character"),
    "too_long": _length("at most", "max_length", "entry"),
    "too_short": _length("at least", "min_length", "entry"),
    "string_pattern_mismatch": lambda _, found: ("must start with /" + (f", not {found}" if found else ""), ""),
}
