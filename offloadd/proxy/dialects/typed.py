"""Bodies as typed messages: checked where a dialect looks at them, and kept where it does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from offloadd.errors import RequestError

T = TypeVar("T", bound=msgspec.Struct)


def decode(fields: Mapping[str, Any], kind: type[T]) -> T:
    """The typed view of a body; RequestError 400 says where it is not as expected."""
    try:
        return msgspec.convert(fields, kind, strict=True)
    except msgspec.ValidationError as error:
        raise RequestError(400, "invalid_body", f"the request's body is not as expected: {error}") from None


def unknown_fields(fields: Mapping[str, Any], kind: type[msgspec.Struct], dropped: Collection[str] = ()) -> dict[str, Any]:
    """Fields that the type does not know: they pass to the engine as they are, but for those that could only harm there."""
    known = kind.__struct_fields__
    return {name: value for name, value in fields.items() if name not in known and name not in dropped}
