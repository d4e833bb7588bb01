"""Folders in Hugging Face's layout: the headers of `*.safetensors` for the weights, `config.json` for everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.hub_extras import said_beside
from offloadd.registry.readers.hub_shapes import HubTally, hub_shape
from offloadd.registry.readers.source import open_source
from offloadd.registry.readers.tensors import Tensor
from offloadd.state.shape import ModelShape

MAX_HEADER = 100_000_000
"""The format's own limit; a header is held whole while it is read, and really lies on disk."""
MAX_TENSORS = 2**18
MAX_SHARDS = 1024
MAX_CONFIG = 4 * 2**20
MAX_INDEX = 64 * 2**20
_MAX_NAME = 1024
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**60

_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
# Possessive throughout: a hostile header costs one pass, never a search.
_TEXT = rb'"(?:[^"\\]++|\\.)*+"'
_ENTRY = re.compile(rb"\s*+(" + _TEXT + rb")\s*+:\s*+(\{(?:[^{}\"]++|" + _TEXT + rb")*+\})\s*+([,}])", re.DOTALL)
_INDEXED = re.compile(rb':\s*+"([^"\\]{1,255})"')


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_folder(folder: Path) -> ModelShape:
    """The shape of the model in `folder`. Raises `HeaderError`."""
    config = _config(folder / "config.json")
    tally = HubTally()
    count = 0
    for path in _shards(folder):
        for tensor in read_tensors(path):
            count += 1
            if count > MAX_TENSORS:
                raise HeaderError(path, 0, f"the model has more than the {MAX_TENSORS} tensors that are read")
            tally.add(tensor)
    try:
        return replace(hub_shape(config, tally), **said_beside(folder, config))
    except ValueError as error:
        raise HeaderError(folder / "config.json", 0, str(error)) from error


def read_tensors(path: Path) -> Iterator[Tensor]:
    """The tensors of one file, as its header lists them. Raises `HeaderError`."""
    with open_source(path, 2 * MAX_HEADER) as source:
        length = int.from_bytes(source.take(8), "little")
        if not 2 <= length <= min(MAX_HEADER, source.left):
            raise source.refuse(
                f"a header of {length} bytes: {source.left} are left in the file, {MAX_HEADER} allowed",
                at=0,
                is_short=length <= MAX_HEADER,
            )
        text = source.take(length, MAX_HEADER)
        room = source.left
    if text[:1] != b"{":
        raise HeaderError(path, 8, "the header is not a JSON object")
    for at, name, value in _entries(path, text):
        if name != "__metadata__":
            yield _tensor(path, at, name, value, room)


def _entries(path: Path, text: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Offset, name and value of each entry, one at a time."""
    at, last = 1, b""
    if text[1:].strip() == b"}":
        return
    while last != b"}":
        entry = _ENTRY.match(text, at)
        if entry is None:
            raise HeaderError(path, 8 + at, "the header is not JSON, or not a list of tensors")
        if entry.end(1) - entry.start(1) > _MAX_NAME:
            raise HeaderError(path, 8 + entry.start(1), f"a name is longer than {_MAX_NAME} bytes")
        try:
            name = msgspec.json.decode(entry[1], type=str)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HeaderError(path, 8 + entry.start(1), f"a name cannot be read: {error}") from error
        yield 8 + entry.start(2), name, entry[2]
        at, last = entry.end(), entry[3]
    if text[at:].strip():
        raise HeaderError(path, 8 + at, "something follows the header's last entry")


def _tensor(path: Path, at: int, name: str, value: bytes, room: int) -> Tensor:
    try:
        entry = msgspec.json.decode(value, type=_Entry)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HeaderError(path, at, f"{name}: {error}") from error
    start, end = entry.data_offsets
    if not 0 <= start <= end <= room:
        raise HeaderError(
            path,
            at,
            f"{name}: its bytes {start} to {end} are not within the {room} that follow the header",
            hint="the file is not whole: copy or download it again, and compare its size with the original",
            is_short=0 <= start <= end,
        )
    if len(entry.shape) > _MAX_DIMENSIONS or any(not 0 <= size <= _MAX_ELEMENTS for size in entry.shape):
        raise HeaderError(path, at, f"{name}: its dimensions are impossible")
    elements = prod(entry.shape)
    bits = _BITS.get(entry.dtype)
    if elements > _MAX_ELEMENTS or (bits is not None and elements * bits != (end - start) * 8):
        raise HeaderError(path, at, f"{name}: {end - start} bytes are not what its shape and its type {entry.dtype:.20} need")
    return Tensor(name, elements, end - start, entry.shape[-1] if entry.shape else 1)


def _config(path: Path) -> dict[str, Any]:
    text = _small(path, MAX_CONFIG)
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HeaderError(path, 0, f"cannot be read: {error}") from error


def _small(path: Path, limit: int) -> bytes:
    with open_source(path, 2 * limit) as source:
        return source.take(source.size, limit)


def _shards(folder: Path) -> tuple[Path, ...]:
    """The files of the model: those of the index, else the one, else all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = {name.group(1) for name in _INDEXED.finditer(_small(index, MAX_INDEX)) if name[1].endswith(b".safetensors")}
        if len(names) > MAX_SHARDS or any(b"/" in name for name in names):
            raise HeaderError(index, 0, f"names {len(names)} files; up to {MAX_SHARDS} beside it are read")
        return tuple(sorted(folder / name.decode("utf-8", "replace") for name in names))
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    found = tuple(sorted(folder.glob("*.safetensors")))[:MAX_SHARDS]
    if not found:
        raise HeaderError(folder, 0, "there is no *.safetensors file")
    return found
