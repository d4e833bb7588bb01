"""Types of single config fields: how each is read, checked and described.

Each reads one value as written and gives what `DesiredState` holds. A problem is raised as one of two kinds:
`expected(…)`, to which the reader of errors adds what was found, or `refused(…)`, which is a whole sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, PlainSerializer, PlainValidator, Strict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError, core_schema

from offloadd.backends import pointers
from offloadd.config.listen import parse_listen
from offloadd.state.wire import Pointer
from offloadd.units import Bytes, Seconds, Share, parse_bytes, parse_seconds, parse_size

EXPECTED = "offloadd_expected"
REFUSED = "offloadd_refused"

_MODEL_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_ALIAS = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$"
_BACKEND_NAME = r"^[a-z][a-z0-9_-]{0,31}$"
_ACCOUNT_NAME = r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}$"
_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"
_GPU_NAME = r"^(default|[0-9]{1,3}|[A-Za-z]+-[A-Za-z0-9/-]{1,80})$"
_DEVICE = r"^([0-9]{1,3}|[A-Za-z]+-[A-Za-z0-9/-]{1,80})$"
_HOST_NAME = r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252})$"
_URL_PATH = r"^/[!\"\x24-~]*$"
_PLACEHOLDER = r"\$\{(env|file):[^}]+\}"
_SIZE = r"[0-9]+(\.[0-9]+)?\s*(B|KiB|MiB|GiB|TiB|kB|KB|MB|GB|TB)"
_SHARE = r"[0-9]+(\.[0-9]+)?\s*%"
_TIME = r"[0-9]+(\.[0-9]+)?\s*(ms|s|m|h|d)"
_MAX_ITEMS = 256


def expected(what: str) -> PydanticCustomError:
    """`expected WHAT, not …`."""
    return PydanticCustomError(EXPECTED, "expected {what}", {"what": what})


def refused(problem: str, hint: str = "", at: str = "") -> PydanticCustomError:
    """A sentence about a value of the right kind; `at` names the key below it that is at fault."""
    return PydanticCustomError(REFUSED, "{problem}", {"problem": problem, "hint": hint, "at": at})


@dataclass(frozen=True, eq=False)
class Written:
    """How the field is spelled in the file, as JSON Schema, where that differs from what it becomes."""

    schema: dict[str, Any]

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Pydantic's hook: the spelling stands for the whole type."""
        del schema, handler
        return dict(self.schema)


def _quantity(pattern: str, *examples: str) -> Written:
    text = {"type": "string", "pattern": rf"^\s*({pattern})\s*$|{_PLACEHOLDER}", "examples": list(examples)}
    return Written({"anyOf": [text, {"const": 0}]})


def _matching(pattern: str, rule: str) -> AfterValidator:
    compiled = re.compile(pattern.replace("$", r"\Z"))

    def check(text: str) -> str:
        if compiled.match(text) is None:
            raise refused(rule)
        return text

    return AfterValidator(check)


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise refused("a NUL character cannot be passed to a program")
    return text


def _is_zero(value: object) -> bool:
    return value == 0 and type(value) is int


def _size(value: object) -> Bytes:
    if _is_zero(value):
        return Bytes(0)
    if not isinstance(value, str):
        raise expected("a size with its unit, such as 6GiB")
    if value.strip().endswith("%"):
        raise refused("a share is not possible here: expected a size such as 6GiB")
    try:
        return parse_bytes(value)
    except ValueError as problem:
        raise refused(str(problem)) from None


def _size_or_share(value: object) -> Bytes | Share:
    if _is_zero(value):
        return Bytes(0)
    if not isinstance(value, str):
        raise expected("a size with its unit or a share, such as 6GiB or 20%")
    try:
        return parse_size(value)
    except ValueError as problem:
        raise refused(str(problem)) from None


def _size_or_auto(value: object) -> Bytes | Literal["auto"]:
    return "auto" if value == "auto" else _size(value)


def _time(value: object) -> Seconds:
    if _is_zero(value):
        return Seconds(0)
    if not isinstance(value, str):
        raise expected("a time with its unit, such as 90s or 10m")
    try:
        return parse_seconds(value)
    except ValueError as problem:
        raise refused(str(problem)) from None


def _time_or_off(value: object) -> Seconds:
    return Seconds(0) if value == "off" else _time(value)


def _size_or_none(value: object) -> Bytes:
    return Bytes(0) if value == "none" else _size(value)


def _more_than_zero(value: Seconds) -> Seconds:
    if value <= 0:
        raise refused("must be more than 0")
    return value


def _layers(value: object) -> int | Literal["auto", "all"]:
    if value == "auto" or value == "all" or (type(value) is int and 0 <= value <= 10_000):
        return value
    raise expected("auto, all or a number of layers")


def _devices(value: object) -> tuple[str, ...] | Literal["auto", "cpu"]:
    if value == "auto" or value == "cpu":
        return value
    if not isinstance(value, list) or not value:
        raise expected("auto, cpu or a list of GPU indexes or UUIDs")
    names = tuple(str(item) for item in value)
    for item, name in zip(value, names, strict=True):
        if type(item) not in (int, str) or not re.fullmatch(_DEVICE.strip("^$"), name):
            raise refused("each device is an index such as 0, or a UUID such as GPU-8f3e…")
    if len(set(names)) < len(names):
        raise refused("a device is listed twice")
    return names


def _listen(text: str) -> str:
    try:
        parse_listen(text)
    except ValueError as problem:
        raise refused(str(problem)) from None
    return text


def _origin(text: str) -> str:
    if re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]{1,260}", text) is None:
        raise refused('expected a site such as "https://chat.example" or "http://localhost:3000", without a path')
    return text.lower()


def _absolute(text: str) -> str:
    if not text.startswith("/") or ".." in text.split("/"):
        raise refused("expected an absolute path without ..")
    return text


def _stores(value: object) -> tuple[str, ...] | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or len(value) > _MAX_ITEMS:
        raise expected("auto, or a list of folders")
    return _unique(tuple(_absolute(_no_nul(item)) for item in value))


def _source(text: str) -> str:
    if ".." in text.split("/"):
        raise refused("a source must not contain ..", "put the file's folder into storage.models_path, or write its absolute path")
    if text.startswith("-"):
        raise refused("a source must not start with -: an engine would read it as an option")
    return text


def _url(text: str) -> str:
    if re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", text) is None:
        raise refused("expected a URL such as https://host/v1, without user name, query or fragment")
    return text


def _pointer(value: object) -> Pointer:
    if not isinstance(value, str):
        raise expected('a JSON pointer such as "/result/0/text"')
    if len(value) > 1024:
        raise refused("needs at most 1,024 characters")
    try:
        return pointers.parse(value)
    except ValueError as problem:
        raise refused(str(problem)) from None


def _place(value: object) -> Pointer:
    found = _pointer(value)
    if not found:
        raise refused('expected a place within the body, such as "/prompt"')
    return found


def _registry(text: str) -> str:
    if re.fullmatch(r"postgresql://[^\s#]+", text) is None:
        raise refused("expected postgresql://user@host/name", "leave it out for a file in storage.data_dir")
    return text


def _unique(items: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((item for index, item in enumerate(items) if item in items[:index]), None)
    if twice is not None:
        raise refused(f'"{twice}" is listed twice')
    return items


def _write_size(value: Bytes | Share | str) -> str | int:
    """As an author would write it: for the defaults in the published schema."""
    if isinstance(value, str | Share):
        return str(value)
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value and value % step == 0:
            return f"{value // step}{unit}"
    return f"{value}B" if value else 0


def _write_time(value: Seconds) -> str | int:
    for unit, step in (("h", 3600), ("m", 60), ("s", 1)):
        if value and value % step == 0:
            return f"{value / step:g}{unit}"
    return f"{value * 1000:g}ms" if value else 0


def _write_time_or_off(value: Seconds) -> str | int:
    return _write_time(value) or "off"


def _write_size_or_none(value: Bytes) -> str | int:
    return _write_size(value) or "none"


_BY_SIZE = PlainSerializer(_write_size)
_BY_TIME = PlainSerializer(_write_time)

Size = Annotated[Bytes, PlainValidator(_size), _BY_SIZE, _quantity(_SIZE, "512MiB", "6GiB")]
SizeOrShare = Annotated[Bytes | Share, PlainValidator(_size_or_share), _BY_SIZE, _quantity(f"{_SIZE}|{_SHARE}", "6GiB", "20%")]
SizeOrAuto = Annotated[Bytes | Literal["auto"], PlainValidator(_size_or_auto), _BY_SIZE, _quantity(f"{_SIZE}|auto", "auto", "6GiB")]
Time = Annotated[Seconds, PlainValidator(_time), _BY_TIME, _quantity(_TIME, "90s", "10m", "1h")]
PositiveTime = Annotated[
    Seconds, PlainValidator(_time), AfterValidator(_more_than_zero), _BY_TIME, _quantity(_TIME, "90s", "10m", "1h")
]
TimeOrOff = Annotated[
    Seconds, PlainValidator(_time_or_off), PlainSerializer(_write_time_or_off), _quantity(f"{_TIME}|off", "off", "5m")
]
SizeOrNone = Annotated[
    Bytes, PlainValidator(_size_or_none), PlainSerializer(_write_size_or_none), _quantity(f"{_SIZE}|none", "none", "24GiB")
]
Layers = Annotated[
    int | Literal["auto", "all"],
    PlainValidator(_layers),
    Written({"anyOf": [{"enum": ["auto", "all"]}, {"type": "integer", "minimum": 0, "maximum": 10_000}]}),
]
Devices = Annotated[
    tuple[str, ...] | Literal["auto", "cpu"],
    PlainValidator(_devices),
    Written(
        {
            "anyOf": [
                {"enum": ["auto", "cpu"]},
                {
                    "type": "array",
                    "minItems": 1,
                    "uniqueItems": True,
                    "items": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": _DEVICE}]},
                },
            ]
        }
    ),
]

Text = Annotated[str, Field(max_length=4096), AfterValidator(_no_nul)]
Words = Annotated[tuple[Text, ...], Strict(False), Field(max_length=_MAX_ITEMS)]
Command = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1, max_length=_MAX_ITEMS)]

ModelKey = Annotated[
    str,
    _matching(_MODEL_NAME, "a model name has 1 to 64 of a-z, 0-9, . _ and -, and starts with a letter or digit"),
    Written({"type": "string", "pattern": _MODEL_NAME}),
]
BackendKey = Annotated[
    str,
    _matching(_BACKEND_NAME, "a backend name has 1 to 32 of a-z, 0-9, _ and -, and starts with a letter"),
    Written({"type": "string", "pattern": _BACKEND_NAME}),
]
EnvKey = Annotated[
    str,
    _matching(_ENV_NAME, "a variable's name has letters, digits and _, and starts with no digit"),
    Written({"type": "string", "pattern": _ENV_NAME}),
]
GpuKey = Annotated[
    str,
    _matching(_GPU_NAME, "expected default, a GPU's index or a GPU's UUID"),
    Written({"type": "string", "pattern": _GPU_NAME}),
]
Alias = Annotated[
    str,
    _matching(_ALIAS, "an alias has 1 to 128 letters, digits and . _ : / @ + -, and starts with a letter or digit"),
    Written({"type": "string", "pattern": f"{_ALIAS}|{_PLACEHOLDER}"}),
]
AccountName = Annotated[
    str,
    _matching(_ACCOUNT_NAME, "expected a user's or a group's name"),
    Written({"type": "string", "pattern": _ACCOUNT_NAME}),
]
HostName = Annotated[str, _matching(_HOST_NAME, "expected a host name, without a port")]
Environment = Annotated[dict[EnvKey, Text], Field(max_length=_MAX_ITEMS)]
Aliases = Annotated[tuple[Alias, ...], Strict(False), Field(max_length=_MAX_ITEMS), AfterValidator(_unique)]
Names = Annotated[tuple[str, ...], Strict(False), Field(min_length=1, max_length=_MAX_ITEMS), AfterValidator(_unique)]
Listen = Annotated[
    tuple[Annotated[str, AfterValidator(_listen)], ...], Strict(False), Field(min_length=1, max_length=64), AfterValidator(_unique)
]
AbsolutePath = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_nul), AfterValidator(_absolute)]
Paths = Annotated[tuple[AbsolutePath, ...], Strict(False), Field(min_length=1, max_length=_MAX_ITEMS), AfterValidator(_unique)]
Stores = Annotated[
    tuple[str, ...] | Literal["auto"],
    PlainValidator(_stores),
    Written(
        {
            "anyOf": [
                {"const": "auto"},
                {"type": "array", "maxItems": _MAX_ITEMS, "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]
Source = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_nul), AfterValidator(_source)]
Url = Annotated[Text, AfterValidator(_url)]
UrlPath = Annotated[
    str,
    Field(max_length=1024),
    _matching(_URL_PATH, "must start with / and have no spaces, no # and nothing beyond ASCII"),
    Written({"type": "string", "pattern": f"{_URL_PATH}|{_PLACEHOLDER}", "maxLength": 1024}),
]
_AS_POINTER = PlainSerializer(pointers.written)
JsonPointer = Annotated[
    Pointer,
    PlainValidator(_pointer),
    _AS_POINTER,
    Written({"type": "string", "pattern": pointers.PATTERN, "maxLength": 1024, "examples": ["/a/0/b"]}),
]
Place = Annotated[
    Pointer,
    PlainValidator(_place),
    _AS_POINTER,
    Written({"type": "string", "pattern": pointers.PATTERN.replace("*$", "+$"), "maxLength": 1024, "examples": ["/a/b"]}),
]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], Strict(False), Field(max_length=_MAX_ITEMS), AfterValidator(_unique)
]
RegistryUrl = Annotated[Text, AfterValidator(_registry)]


def _same_both(value: object) -> object:
    """`replicas: 2` means exactly two."""
    if type(value) is int:
        return {"min": value, "max": value}
    if not isinstance(value, dict):
        raise expected("a whole number, or a mapping such as {min: 0, max: 3}")
    return value


SameBoth = BeforeValidator(_same_both)
