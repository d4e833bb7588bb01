"""Reads as much of a GGUF file as llama-server's first checks do, and fails in llama-server's words."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}
"""Tensor types whose elements stand alone, and the bytes of one."""
_IN_32S = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 36, 20: 18, 39: 17}
_IN_256S = {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 15: 292, 23: 136}
"""Quantized types: the bytes of a block of 32, or of 256, elements."""
_FILE_TYPES = {0: "all F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 15: "Q4_K - Medium", 32: "BF16"}


class BadModel(Exception):
    """A file that cannot be loaded; the text is llama-server's line about it."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What `/v1/models` and `/props` tell of a file. A file without metadata gets the figures of SmolLM2-135M."""

    meta: dict[str, object] = field(default_factory=dict)
    n_params: int = 0
    size: int = 0

    def _figure(self, key: str, default: int) -> int:
        value = self.meta.get(f"{self.meta.get('general.architecture')}.{key}", default)
        return value if isinstance(value, int) else default

    @property
    def n_vocab(self) -> int:
        count = self.meta.get("tokenizer.ggml.tokens", 49152)
        return count if isinstance(count, int) else 49152

    @property
    def n_ctx_train(self) -> int:
        return self._figure("context_length", 8192)

    @property
    def n_embd(self) -> int:
        return self._figure("embedding_length", 576)

    @property
    def ftype(self) -> str:
        return _FILE_TYPES.get(self._file_type, "unknown")

    @property
    def _file_type(self) -> int:
        value = self.meta.get("general.file_type", 3)
        return value if isinstance(value, int) else 3


def read(path: str) -> ModelFile:
    """Read the header, the metadata and the tensor list; check that every tensor lies within the file."""
    try:
        with Path(path).open("rb") as file:
            return _read(_mapped(file.fileno()))
    except IsADirectoryError:
        raise BadModel("gguf_init_from_reader: failed to read magic") from None
    except OSError as problem:
        raise BadModel(f"gguf_init_from_file: failed to open GGUF file '{path}' ({problem.strerror})") from None


def _mapped(descriptor: int) -> mmap.mmap | bytes:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file
        return b""


def _read(data: mmap.mmap | bytes) -> ModelFile:
    magic = data[:4]
    if len(magic) < 4:
        raise BadModel("gguf_init_from_reader: failed to read magic")
    if magic != b"GGUF":
        shown = "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in magic)
        raise BadModel(f"gguf_init_from_reader: invalid magic characters: '{shown}', expected 'GGUF'")
    try:
        version, tensors, pairs = struct.unpack_from("<Iqq", data, 4)
        if version > 3:
            text = f"this GGUF file is version {version} but this software only supports up to version 3"
            raise BadModel(f"gguf_init_from_reader: {text}")
        meta, at = _metadata(data, 24, pairs)
        return _tensors(data, at, tensors, meta)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise BadModel("gguf_init_from_reader: failed to read key-value pairs") from None


def _metadata(data: mmap.mmap | bytes, at: int, pairs: int) -> tuple[dict[str, object], int]:
    meta: dict[str, object] = {}
    for _ in range(pairs):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        meta[key], at = _value(data, at + 4, kind)
    return meta, at


def _text(data: mmap.mmap | bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise IndexError(end)
    return data[at + 8 : end].decode(), end


def _value(data: mmap.mmap | bytes, at: int, kind: int) -> tuple[object, int]:
    """One value; of an array only its length is kept."""
    if kind == _STRING:
        return _text(data, at)
    if kind == _ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        return count, _skip_items(data, at + 12, item, count)
    code = _SCALARS.get(kind, "B")
    (value,) = struct.unpack_from(f"<{code}", data, at)
    return value, at + struct.calcsize(code)


def _skip_items(data: mmap.mmap | bytes, at: int, item: int, count: int) -> int:
    if item != _STRING:
        return at + count * struct.calcsize(_SCALARS.get(item, "B"))
    unpack = struct.Struct("<Q").unpack_from
    for _ in range(count):
        at += 8 + unpack(data, at)[0]
    return at


def _tensors(data: mmap.mmap | bytes, at: int, count: int, meta: dict[str, object]) -> ModelFile:
    extents: list[tuple[str, int, int]] = []
    params = size = 0
    for _ in range(count):
        name, at = _text(data, at)
        (dims,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{dims}qIQ", data, at + 4)
        at += 4 + 8 * dims + 12
        elements = prod(shape)
        length = _bytes(kind, elements)
        extents.append((name, offset, length))
        params, size = params + elements, size + length
    alignment = meta.get("general.alignment", 32)
    start = -(-at // alignment) * alignment if isinstance(alignment, int) else at
    for name, offset, length in extents:
        if start + offset + length > len(data):
            text = f"tensor '{name}' data is not within the file bounds, model is corrupted or incomplete"
            raise BadModel(f"llama_model_load: error loading model: {text}")
    return ModelFile(meta, params, size)


def _bytes(kind: int, elements: int) -> int:
    if kind in _IN_32S:
        return elements // 32 * _IN_32S[kind]
    if kind in _IN_256S:
        return elements // 256 * _IN_256S[kind]
    return elements * _PLAIN.get(kind, 0)
