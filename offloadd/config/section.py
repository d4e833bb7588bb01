"""What every mapping of the config has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping with known keys, in which nothing is coerced and nothing unknown is allowed."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        defer_build=True,  # until the first config is read: built once, as parts of the whole, rather than each by itself as well
        hide_input_in_errors=True,
        regex_engine="python-re",
    )
