"""GGUF headers: metadata and the table of tensors, of one file or of all shards of a split one. Never the weights.

A header is text from strangers, so everything has a bound: what is read and held is decided here, not by the file.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.ggml import BLOCKS
from offloadd.registry.readers.source import Source, open_source
from offloadd.registry.readers.tensors import Tensor

MAX_KEYS = 2**16
MAX_TENSORS = 2**16
MAX_SHARDS = 1024
MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 128
MAX_STRING_BYTES = 2**20
"""Longer strings are left out, not refused."""
MAX_ITEMS = 4096
"""Longer arrays are left out, and so are arrays of strings."""
MAX_KEPT = 8 * 2**20
"""Metadata held in memory, in bytes; beyond it the file is refused."""
_MAX_ELEMENTS = 2**60
_MAX_ALIGNMENT = 2**20
_KEPT_EACH = 100
"""What a key or an item costs beside its own bytes, about."""

_BOOL, _STRING, _ARRAY = 7, 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_SMALLEST_PAIR = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
_SHARD = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Omitted:
    """A value that was passed over: `count` bytes of text, or items of an array."""

    count: int


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | Omitted


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What one GGUF model says before its weights. `offsets` tells where in the (first) file a key's value lies."""

    path: Path
    version: int
    little_endian: bool
    metadata: Mapping[str, Value]
    offsets: Mapping[str, int]
    tensors: tuple[Tensor, ...]
    shards: tuple[Path, ...]

    def refuse(self, key: str, problem: str) -> HeaderError:
        """The error to raise for the value of `key`."""
        return HeaderError(self.path, self.offsets.get(key, 0), f"{key}: {problem}")


def read_header(path: Path) -> GgufHeader:
    """The header of the model that `path` is a file of; any shard stands for all. Raises `HeaderError`."""
    header = _read_file(path)
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return header
    return _join(header, count)


def _join(header: GgufHeader, count: int) -> GgufHeader:
    """All shards as one: metadata of the first, tensors of all."""
    named = _SHARD.fullmatch(header.path.name)
    if named is None or int(named["count"]) != count:
        raise header.refuse("split.count", f"one of {count} shards, yet its name does not end in -00001-of-{count:05d}.gguf")
    if count > MAX_SHARDS:
        raise header.refuse("split.count", f"{count} shards are more than the {MAX_SHARDS} that are read")
    paths = [header.path.with_name(f"{named['prefix']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    first: GgufHeader | None = None
    tensors: list[Tensor] = []
    for number, path in enumerate(paths):
        shard = header if path == header.path else _read_file(path)
        first = first or shard
        if shard.metadata.get("split.no") != number or shard.metadata.get("split.count") != count:
            raise shard.refuse("split.no", f"is not shard {number + 1} of {count}, as its name says")
        tensors += shard.tensors
        if len(tensors) > MAX_TENSORS:
            raise shard.refuse("split.no", f"the shards have more than the {MAX_TENSORS} tensors that are read")
    assert first is not None  # noqa: S101  (count is at least 2)
    announced = first.metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise first.refuse("split.tensors.count", f"{announced} tensors are announced, the shards have {len(tensors)}")
    return GgufHeader(
        path=first.path,
        version=first.version,
        little_endian=first.little_endian,
        metadata=first.metadata,
        offsets=first.offsets,
        tensors=tuple(tensors),
        shards=tuple(paths),
    )


def _read_file(path: Path) -> GgufHeader:
    with open_source(path) as source:
        return _FileReader(source).read()


class _FileReader:
    """Reads one file from its first byte to the end of its header."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._metadata: dict[str, Value] = {}
        self._offsets: dict[str, int] = {}
        self._kept = 0

    def read(self) -> GgufHeader:
        version = self._start()
        tensor_count = self._count("tensors", MAX_TENSORS)
        key_count = self._count("keys", MAX_KEYS)
        if key_count * _SMALLEST_PAIR + tensor_count * _SMALLEST_TENSOR > self._source.left:
            raise self._source.refuse(
                f"{key_count} keys and {tensor_count} tensors are announced: the file has no room for them", is_short=True
            )
        for _ in range(key_count):
            self._pair()
        tensors = self._tensors(tensor_count)
        return GgufHeader(
            path=self._source.path,
            version=version,
            little_endian=self._little,
            metadata=self._metadata,
            offsets=self._offsets,
            tensors=tensors,
            shards=(self._source.path,),
        )

    def _start(self) -> int:
        """Magic and version; the version tells the byte order."""
        if self._source.take(4) != b"GGUF":
            raise self._source.refuse("not a GGUF file", at=0)
        raw = self._source.take(4)
        # Written on a machine of the other order, the version's low half looks like 0.
        self._little = raw[:2] != b"\0\0"
        mark = "<" if self._little else ">"
        self._structs = {kind: struct.Struct(mark + letter) for kind, letter in _FORMATS.items()}
        self._u32, self._u64, self._i64 = self._structs[4], self._structs[10], self._structs[11]
        version = int(self._u32.unpack(raw)[0])
        if version not in (2, 3):
            raise self._source.refuse(f"GGUF version {version} is not known, only 2 and 3 are", at=4)
        return version

    def _number(self, form: struct.Struct) -> int:
        return int(form.unpack(self._source.take(form.size))[0])

    def _count(self, what: str, limit: int) -> int:
        at = self._source.position
        count = self._number(self._i64)
        if not 0 <= count <= limit:
            raise self._source.refuse(f"{count} {what} are announced, at most {limit} are read", at=at)
        return count

    def _text(self, what: str, limit: int) -> str:
        at = self._source.position
        length = self._number(self._u64)
        if length > limit:
            raise self._source.refuse(f"{what} of {length} bytes is longer than {limit}", at=at)
        return self._source.take(length).decode("utf-8", "replace")

    def _pair(self) -> None:
        at = self._source.position
        key = self._text("a key", MAX_KEY_BYTES)
        if key in self._metadata:
            raise self._source.refuse(f"the key {key} appears a second time", at=at)
        kind = self._number(self._u32)
        self._offsets[key] = self._source.position
        self._keep(len(key))
        self._metadata[key] = self._value(key, kind)

    def _keep(self, size: int) -> None:
        self._kept += size + _KEPT_EACH
        if self._kept > MAX_KEPT:
            raise self._source.refuse(f"the metadata is more than the {MAX_KEPT} bytes that are held of it")

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        form = self._structs.get(kind)
        if form is None:
            raise self._source.refuse(f"{key}: type {kind} is not known", at=self._source.position - 4)
        value: Scalar = form.unpack(self._source.take(form.size))[0]
        return value

    def _string(self) -> str | Omitted:
        length = self._number(self._u64)
        if length > MAX_STRING_BYTES:
            self._source.skip(length)
            return Omitted(length)
        self._keep(length)
        return self._source.take(length).decode("utf-8", "replace")

    def _array(self, key: str) -> tuple[Scalar, ...] | Omitted:
        at = self._source.position
        kind, count = self._number(self._u32), self._number(self._u64)
        if kind == _STRING:
            if count * self._u64.size > self._source.left:
                raise self._source.refuse(
                    f"{key}: {count} strings are announced, the file has no room for them", at=at, is_short=True
                )
            self._source.skip_strings(count, self._u64)
            return Omitted(count)
        form = self._structs.get(kind)
        if form is None:
            what = "arrays of arrays are not read" if kind == _ARRAY else f"type {kind} is not known"
            raise self._source.refuse(f"{key}: {what}", at=at)
        if count * form.size > self._source.left:
            raise self._source.refuse(f"{key}: {count} items are announced, the file has no room for them", at=at, is_short=True)
        if count > MAX_ITEMS:
            self._source.skip(count * form.size)
            return Omitted(count)
        self._keep(count * 40)
        return struct.unpack(f"{form.format[0]}{count}{form.format[1]}", self._source.take(count * form.size))

    def _tensors(self, count: int) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        places = _Places()
        for _ in range(count):
            places.at.append(self._source.position)
            name = self._text("a tensor's name", MAX_NAME_BYTES)
            elements, width = self._dimensions(name)
            size = self._bytes(name, elements, width)
            places.offsets.append(self._number(self._u64))
            tensors.append(Tensor(name, elements, size, width))
        alignment = self._alignment()
        start = -(-self._source.position // alignment) * alignment
        return places.check(tensors, start, alignment, self._source)

    def _dimensions(self, name: str) -> tuple[int, int]:
        """Elements in all, and of the first dimension."""
        at = self._source.position
        count = self._number(self._u32)
        if count > 4:
            raise self._source.refuse(f"{name}: {count} dimensions, a tensor has at most 4", at=at)
        elements, width = 1, 1
        for index in range(count):
            size = self._number(self._i64)
            elements *= size
            if size < 0 or elements > _MAX_ELEMENTS:
                raise self._source.refuse(f"{name}: its dimensions are impossible", at=at)
            width = size if index == 0 else width
        return elements, width

    def _bytes(self, name: str, elements: int, width: int) -> int:
        """-1 for a type that came after us: its place in the file will tell."""
        at = self._source.position
        kind = self._number(self._u32)
        if kind not in BLOCKS:
            return -1
        block, size = BLOCKS[kind]
        if width % block:
            raise self._source.refuse(f"{name}: rows of {width} elements are not whole blocks of {block}", at=at)
        return elements // block * size

    def _alignment(self) -> int:
        alignment = self._metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            at = self._offsets.get("general.alignment", 0)
            raise self._source.refuse(f"general.alignment: {alignment!r} is not a power of two up to {_MAX_ALIGNMENT}", at=at)
        return alignment


class _Places:
    """Where the tensors of one file are described, and where their data lies, counted from the data's start."""

    def __init__(self) -> None:
        self.at = array("Q")
        self.offsets = array("Q")

    def check(self, tensors: list[Tensor], start: int, alignment: int, source: Source) -> tuple[Tensor, ...]:
        """The tensors with sizes filled in, once each is seen to lie within the file."""
        room = source.size - start
        ends = dict(_gaps(self.offsets, room))
        for index, (offset, tensor) in enumerate(zip(self.offsets, tensors, strict=True)):
            size = tensor.bytes if tensor.bytes >= 0 else ends[offset] - offset
            if offset % alignment:
                raise source.refuse(f"{tensor.name}: its data is not aligned to {alignment}", at=self.at[index])
            if size < 0 or offset + size > room:
                raise source.refuse(
                    f"{tensor.name}: its {max(0, size)} bytes would end {offset + size - room} bytes behind the end of the file",
                    at=self.at[index],
                    hint="the file is not whole: copy or download it again, and compare its size with the original",
                    is_short=True,
                )
            if tensor.bytes < 0:
                tensors[index] = tensor._replace(bytes=size)
        return tuple(tensors)


def _gaps(offsets: array[int], room: int) -> Iterator[tuple[int, int]]:
    """Each offset, and where the next one begins."""
    ordered = sorted(set(offsets))
    return zip(ordered, [*ordered[1:], room], strict=False)
