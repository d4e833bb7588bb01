"""Our reader of GGUF headers against the `gguf` package, which wrote the files and reads them too."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

import numpy as np  # noqa: E402
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter  # noqa: E402
from gguf.constants import GGML_QUANT_SIZES  # noqa: E402

from offloadd.demo import find_model  # noqa: E402
from offloadd.errors import OffloaddError  # noqa: E402
from offloadd.registry.readers.errors import HeaderError  # noqa: E402
from offloadd.registry.readers.ggml import BLOCKS  # noqa: E402
from offloadd.registry.readers.gguf import MAX_ITEMS, MAX_STRING_BYTES, Omitted, read_header  # noqa: E402

SCALARS = {
    "u8": ("add_uint8", 200),
    "i8": ("add_int8", -100),
    "u16": ("add_uint16", 60000),
    "i16": ("add_int16", -30000),
    "u32": ("add_uint32", 4_000_000_000),
    "i32": ("add_int32", -2_000_000_000),
    "f32": ("add_float32", 0.5),
    "bool": ("add_bool", True),
    "string": ("add_string", "wörd"),
    "u64": ("add_uint64", 2**63),
    "i64": ("add_int64", -(2**62)),
    "f64": ("add_float64", 0.1),
}


def write(path: Path, *, endian: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    writer = GGUFWriter(path, "llama", endianess=endian)
    for key, (method, value) in SCALARS.items():
        getattr(writer, method)(f"test.{key}", value)
    writer.add_array("test.counts", [3, 0, 7])
    writer.add_array("test.flags", [True, False, True])
    writer.add_array("test.floats", [0.5, 0.25])
    writer.add_array("test.words", ["a", "", "b" * 300_000, "é"] * 3)
    writer.add_array("test.long", list(range(MAX_ITEMS + 1)))
    writer.add_string("test.text", "x" * (MAX_STRING_BYTES + 1))
    writer.add_tensor("blk.0.a.weight", np.zeros((2, 3, 4, 32), np.float32))
    writer.add_tensor("blk.0.b.weight", np.zeros((5, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", np.zeros(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
def test_every_value_type_is_read_as_it_was_written(tmp_path: Path, endian: GGUFEndian) -> None:
    header = read_header(write(tmp_path / "m.gguf", endian=endian))

    assert header.little_endian == (endian == GGUFEndian.LITTLE)
    assert header.version == 3
    assert {key: header.metadata[f"test.{key}"] for key in SCALARS} == {key: value for key, (_, value) in SCALARS.items()}
    assert header.metadata["test.counts"] == (3, 0, 7)
    assert header.metadata["test.flags"] == (True, False, True)
    assert header.metadata["test.floats"] == (0.5, 0.25)


def test_long_values_are_passed_over_with_their_length_kept(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "m.gguf"))

    assert header.metadata["test.words"] == Omitted(12)
    assert header.metadata["test.long"] == Omitted(MAX_ITEMS + 1)
    assert header.metadata["test.text"] == Omitted(MAX_STRING_BYTES + 1)


@pytest.mark.parametrize("endian", [GGUFEndian.LITTLE, GGUFEndian.BIG])
def test_tensors_have_the_sizes_that_the_oracle_reads(tmp_path: Path, endian: GGUFEndian) -> None:
    path = write(tmp_path / "m.gguf", endian=endian)

    ours = [(tensor.name, tensor.elements, tensor.bytes) for tensor in read_header(path).tensors]

    assert ours == [(tensor.name, int(tensor.n_elements), int(tensor.n_bytes)) for tensor in GGUFReader(path).tensors]
    assert [tensor.width for tensor in read_header(path).tensors] == [32, 32, 7]


def test_a_real_model_reads_as_the_oracle_reads_it() -> None:
    path = _real_model()
    header, oracle = read_header(path), GGUFReader(path)

    assert [tensor[:3] for tensor in header.tensors] == [(t.name, int(t.n_elements), int(t.n_bytes)) for t in oracle.tensors]
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert set(header.metadata) == set(fields)
    for name, value in header.metadata.items():
        theirs = fields[name].contents()
        assert value == (Omitted(len(theirs)) if isinstance(theirs, list) else theirs), name


def _real_model() -> Path:
    try:
        return find_model()
    except OffloaddError as error:
        pytest.skip(error.message)


def test_the_table_of_types_is_the_oracles_but_for_one() -> None:
    theirs = {kind.value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    # Blocks of q8_1 shrank from two f32 to two f16; no file has any.
    theirs[GGMLQuantizationType.Q8_1.value] = BLOCKS[GGMLQuantizationType.Q8_1.value]

    assert {kind: BLOCKS.get(kind) for kind in theirs} == theirs


def shards(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = GGUFWriter(path, "llama") if number == 0 else GGUFWriter(path, "")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        if number == 0:
            writer.add_uint32("llama.block_count", count)
        writer.add_tensor(f"blk.{number}.w", np.zeros(32 * (number + 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_shard_stands_for_the_whole_model(tmp_path: Path, given: int) -> None:
    paths = shards(tmp_path)

    header = read_header(paths[given])

    assert [(tensor.name, tensor.bytes) for tensor in header.tensors] == [("blk.0.w", 128), ("blk.1.w", 256), ("blk.2.w", 384)]
    assert header.metadata["llama.block_count"] == 3
    assert header.shards == tuple(paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()

    with pytest.raises(HeaderError, match="m-00002-of-00003") as caught:
        read_header(paths[0])
    assert caught.value.path == paths[1]


def test_a_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())

    with pytest.raises(HeaderError, match="is not shard 3 of 3"):
        read_header(paths[0])


def test_a_shard_under_another_name_is_refused(tmp_path: Path) -> None:
    alone = tmp_path / "model.gguf"
    shards(tmp_path)[0].rename(alone)

    with pytest.raises(HeaderError, match="one of 3 shards"):
        read_header(alone)


class Bytes:
    """A header put together by hand, to say what no writer would."""

    def __init__(self, *, tensors: int = 0, keys: int = 0, version: int = 3) -> None:
        self.data = b"GGUF" + struct.pack("<Iqq", version, tensors, keys)

    def text(self, value: bytes) -> Bytes:
        return self.add("<Q", len(value)).raw(value)

    def add(self, form: str, *values: float) -> Bytes:
        return self.raw(struct.pack(form, *values))

    def raw(self, value: bytes) -> Bytes:
        self.data += value
        return self

    def key(self, name: bytes, kind: int) -> Bytes:
        return self.text(name).add("<I", kind)

    def tensor(self, name: bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> Bytes:
        return self.text(name).add(f"<I{len(sizes)}q", len(sizes), *sizes).add("<IQ", kind, offset)


def padded(header: Bytes, data: int = 64) -> Bytes:
    return header.raw(b"\0" * (-len(header.data) % 32 + data))


HOSTILE = {
    "not a GGUF file": (b"GGML" + bytes(60), 0),
    "version 1 is": (Bytes(version=1).data + bytes(64), 4),
    "version 1234567 is": (Bytes(version=1234567).data + bytes(64), 4),
    "-1 tensors are announced": (Bytes(tensors=-1).data + bytes(64), 8),
    "9223372036854775807 tensors are announced": (Bytes(tensors=2**63 - 1).data + bytes(64), 8),
    "70000 keys are announced": (Bytes(keys=70000).data + bytes(64), 16),
    "no room for them": (Bytes(tensors=60000, keys=60000).data + bytes(64), 24),
    "a key of 18446744073709551615 bytes": (Bytes(keys=1).add("<Q", 2**64 - 1).raw(bytes(64)).data, 24),
    "appears a second time": (Bytes(keys=2).key(b"a", 0).raw(b"1").key(b"a", 0).raw(b"1").raw(bytes(64)).data, 38),
    "a: type 13 is not known": (Bytes(keys=1).key(b"a", 13).raw(bytes(64)).data, 33),
    "a: arrays of arrays": (Bytes(keys=1).key(b"a", 9).add("<IQ", 9, 1).raw(bytes(64)).data, 37),
    "a: 9223372036854775808 items": (Bytes(keys=1).key(b"a", 9).add("<IQ", 10, 2**63).raw(bytes(64)).data, 37),
    "a: 2305843009213693952 strings": (Bytes(keys=1).key(b"a", 9).add("<IQ", 8, 2**61).raw(bytes(64)).data, 37),
    "a string reaches past the end": (
        Bytes(keys=1).key(b"a", 9).add("<IQ", 8, 2).text(b"ab").add("<Q", 2**63).raw(bytes(64)).data,
        59,
    ),
    "9223372036854775808 bytes are announced": (Bytes(keys=1).key(b"a", 8).add("<Q", 2**63).raw(bytes(64)).data, 45),
    "t: 5 dimensions": (Bytes(tensors=1).tensor(b"t", (1, 1, 1, 1, 1)).raw(bytes(64)).data, 33),
    "t: its dimensions are impossible": (Bytes(tensors=1).tensor(b"t", (2**62, 2**62, 4)).raw(bytes(64)).data, 33),
    "t: rows of 33 elements": (Bytes(tensors=1).tensor(b"t", (33,), 8).raw(bytes(64)).data, 45),
    "a tensor's name of 4096 bytes": (Bytes(tensors=1).add("<Q", 4096).raw(bytes(64)).data, 24),
    "bytes behind the end of the file": (padded(Bytes(tensors=1).tensor(b"t", (64,))).data, 24),
    "is not aligned to 32": (padded(Bytes(tensors=1).tensor(b"t", (1,), 0, 7)).data, 24),
    "3 is not a power of two": (padded(Bytes(keys=1).key(b"general.alignment", 4).add("<I", 3)).data, 53),
}


@pytest.mark.parametrize("problem", HOSTILE)
def test_hostile_headers_are_refused_with_file_and_offset(tmp_path: Path, problem: str) -> None:
    content, offset = HOSTILE[problem]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)

    with pytest.raises(HeaderError) as caught:
        read_header(path)

    assert problem in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.offset == offset


def test_a_type_from_the_future_is_measured_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    header = Bytes(tensors=2).tensor(b"a", (640,), 99, 0).tensor(b"b", (8,), 0, 96)
    path.write_bytes(padded(header, 128).data)

    assert [tensor.bytes for tensor in read_header(path).tensors] == [96, 32]


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    path.write_bytes(padded(Bytes(version=2, tensors=1).tensor(b"a", (8,))).data)

    assert read_header(path).tensors[0].bytes == 32


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="not a regular file"):
        read_header(Path("/dev/zero"))
    with pytest.raises(HeaderError, match="No such file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(HeaderError, match="cannot be opened"):
        read_header(Path("a\0b"))
