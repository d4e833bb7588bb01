"""One row of a model file's table of tensors."""

from __future__ import annotations

from typing import NamedTuple


class Tensor(NamedTuple):
    """`width` is the length of a row: the dimension that varies fastest."""

    name: str
    elements: int
    bytes: int
    width: int
