"""Headers that no writer made: the readers refuse them with a place, or read them; they never crash, and never hold much.

10,000 of them, the same in every run: random ones, and real ones with a few bytes changed.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offloadd.demo import find_model
from offloadd.errors import OffloaddError
from offloadd.registry.readers import HeaderError, read_model
from offloadd.registry.readers.gguf import MAX_ITEMS, MAX_KEPT, MAX_KEYS, MAX_NAME_BYTES, MAX_STRING_BYTES, MAX_TENSORS

MIB = 2**20
GGUF_BOUND = 48 * MIB
"""Python objects at once while a GGUF header is read, whatever it says; its tables are the most of it."""
FOLDER_BOUND = 16 * MIB
"""The same for a folder, beside its longest header."""
ROUNDS = {"random": 3000, "assembled": 3000, "small": 2600, "real": 400, "safetensors": 1000}
assert sum(ROUNDS.values()) == 10_000

_INTERESTING = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def small_model() -> bytes:
    """A whole model of 2 KB, with a value of every type."""
    pairs = [
        pair("general.architecture", 8, text(b"gemma3")),
        pair("gemma3.block_count", 4, struct.pack("<I", 2)),
        pair("gemma3.embedding_length", 4, struct.pack("<I", 32)),
        pair("gemma3.feed_forward_length", 9, struct.pack("<IQII", 5, 2, 64, 64)),
        pair("gemma3.attention.head_count", 4, struct.pack("<I", 4)),
        pair("gemma3.attention.head_count_kv", 9, struct.pack("<IQII", 4, 2, 2, 1)),
        pair("gemma3.attention.sliding_window", 4, struct.pack("<I", 64)),
        pair("gemma3.attention.sliding_window_pattern", 9, struct.pack("<IQ??", 7, 2, True, False)),
        pair("gemma3.rope.freq_base", 6, struct.pack("<f", 1e4)),
        pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 5) + b"".join(text(b"w" * size) for size in (1, 0, 7, 300, 2))),
        pair("tokenizer.chat_template", 8, text(b"{{ messages }}")),
        *(
            pair(f"test.{kind}", kind, bytes(size))
            for kind, size in ((0, 1), (1, 1), (2, 2), (3, 2), (7, 1), (10, 8), (11, 8), (12, 8))
        ),
    ]
    names = [f"blk.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn_q", "ffn_up", "ffn_up_exps")]
    tensors = b"".join(
        text(name.encode()) + struct.pack("<IqqIQ", 2, 32, 4, 8, 160 * index)
        for index, name in enumerate(["token_embd.weight", *names])
    )
    header = b"GGUF" + struct.pack("<Iqq", 3, 1 + len(names), len(pairs)) + b"".join(pairs) + tensors
    return header + bytes(-len(header) % 32 + 160 * (1 + len(names)))


def random_bytes(rng: random.Random) -> bytes:
    return b"GGUF" + struct.pack("<I", rng.choice([2, 3, 3 << 24])) + rng.randbytes(rng.randrange(400))


def assembled(rng: random.Random) -> bytes:
    """Parts of a header in their order, with numbers of all sizes."""
    data = b"GGUF" + struct.pack("<IQQ", 3, rng.choice([0, 1, 2, 3, 40_000]), rng.choice([0, 1, 2, 5, 40_000]))
    for _ in range(rng.randrange(8)):
        name = rng.choice([b"general.architecture", b"general.alignment", b"llama.block_count", b"split.count", rng.randbytes(3)])
        kind = rng.randrange(14)
        data += text(name) + struct.pack("<I", kind)
        if kind == 9:
            data += struct.pack("<IQ", rng.randrange(14), rng.choice([0, 1, 3, MAX_ITEMS, *_INTERESTING]))
        data += struct.pack("<Q", rng.choice([1, 5, *_INTERESTING])) + rng.randbytes(rng.randrange(30))
    for _ in range(rng.randrange(4)):
        count = rng.choice([0, 1, 2, 3, 4, 4, 5, 2**32 - 1])
        data += text(rng.choice([b"blk.0.w", b"blk.99999999.w", b"output.weight"])) + struct.pack("<I", count)
        data += struct.pack(f"<{min(count, 5)}Q", *(rng.choice([1, 32, *_INTERESTING]) for _ in range(min(count, 5))))
        data += struct.pack("<IQ", rng.randrange(50), rng.choice([0, 32, *_INTERESTING]))
    return data + bytes(rng.choice([0, 64, 4096]))


def mutated(rng: random.Random, original: bytes, end: int) -> list[tuple[int, bytes]]:
    """A few places before `end`, and what to write there."""
    changes = []
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(4, end)
        new = struct.pack("<Q", rng.choice(_INTERESTING))[: rng.choice([1, 2, 4, 8])] if rng.random() < 0.5 else rng.randbytes(1)
        changes.append((at, new[: len(original) - at]))
    return changes


def check(path: Path) -> bool:
    """Read; whether it was read. A refusal names the file and a byte of it."""
    try:
        read_model(path)
    except HeaderError as error:
        refusal = error
    else:
        return True
    assert str(refusal.path) in refusal.message
    assert f"at byte {refusal.offset}" in refusal.message
    assert 0 <= refusal.offset <= (refusal.path.stat().st_size if refusal.path.exists() else 0)
    return False


@contextmanager
def bounded(limit: int) -> Iterator[None]:
    """The most that is allocated inside stays below `limit` bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("make", [random_bytes, assembled])
def test_random_headers(tmp_path: Path, make: Callable[[random.Random], bytes]) -> None:
    rng, path = random.Random(f"headers {make.__name__}"), tmp_path / "fuzz.gguf"
    rounds = ROUNDS["random" if make is random_bytes else "assembled"]
    with bounded(GGUF_BOUND):
        for _ in range(rounds):
            path.write_bytes(make(rng))
            check(path)


def test_a_small_model_with_bytes_changed(tmp_path: Path) -> None:
    original, rng, path = small_model(), random.Random("small"), tmp_path / "fuzz.gguf"
    path.write_bytes(original)
    assert check(path)
    read = 0
    with bounded(GGUF_BOUND):
        for _ in range(ROUNDS["small"]):
            data = bytearray(original)
            for at, new in mutated(rng, original, len(original)):
                data[at : at + len(new)] = new
            path.write_bytes(data)
            read += check(path)

    assert 0 < read < ROUNDS["small"]


def test_a_small_model_cut_at_every_byte(tmp_path: Path) -> None:
    original, path = small_model(), tmp_path / "cut.gguf"
    path.write_bytes(original)
    # Behind the last tensor's 136 bytes stand 24 that nobody needs.
    for size in reversed(range(len(original) - 24)):
        os.truncate(path, size)
        assert not check(path)


def test_the_real_model_with_bytes_changed(tmp_path: Path) -> None:
    """Its header has a vocabulary of 49,152 words."""
    try:
        model = find_model()
    except OffloaddError as error:
        pytest.skip(error.message)
    with model.open("rb") as file:
        header = file.read(2 * MIB)
    rng, path = random.Random("real"), tmp_path / "fuzz.gguf"
    path.write_bytes(header)
    os.truncate(path, model.stat().st_size)  # sparse: only the header is there
    assert check(path)

    def rounds(count: int) -> None:
        with path.open("r+b", buffering=0) as file:
            for _ in range(count):
                # Most of it is words: the places that matter get their share.
                changes = mutated(rng, header, rng.choice([2000, len(header) - 300_000, len(header) - 300_000]))
                for at, new in changes:
                    os.pwrite(file.fileno(), new, at)
                check(path)
                for at, new in changes:
                    os.pwrite(file.fileno(), header[at : at + len(new)], at)

    with bounded(GGUF_BOUND):  # a hundred times slower, for so many words
        rounds(10)
    rounds(ROUNDS["real"] - 10)


def test_folders_with_bytes_changed(tmp_path: Path) -> None:
    entries = {f"model.layers.{n}.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * n, 16 * n + 16]} for n in range(4)}
    listed = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    originals = {
        "config.json": json.dumps(
            {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
        ).encode(),
        "model.safetensors": struct.pack("<Q", len(listed)) + listed + bytes(64),
    }
    rng = random.Random("folders")
    for name, content in originals.items():
        (tmp_path / name).write_bytes(content)
    assert check(tmp_path)
    with bounded(FOLDER_BOUND):
        for index in range(ROUNDS["safetensors"]):
            name = ("config.json", "model.safetensors")[index % 4 > 0]
            data = bytearray(originals[name])
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(data))
                data[at : at + rng.randrange(3)] = rng.choice(
                    [b"{", b"}", b"[", b'"', b"\\", b",", b"9" * 30, b"-", rng.randbytes(2)]
                )
            (tmp_path / name).write_bytes(data)
            check(tmp_path)
            (tmp_path / name).write_bytes(originals[name])


def gguf(tensors: int, keys: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", 3, tensors, keys) + body


def names(size: int, count: int) -> Iterator[bytes]:
    return (f"{number:0{size}d}".encode() for number in range(count))


GREEDY: dict[str, Callable[[], bytes]] = {
    "as many tensors as are read": lambda: (
        gguf(MAX_TENSORS, 0, b"".join(text(name) + struct.pack("<IqIQ", 1, 0, 0, 0) for name in names(MAX_NAME_BYTES, MAX_TENSORS)))
        + bytes(64)
    ),
    "as many keys as are read": lambda: (
        gguf(0, MAX_KEYS, b"".join(text(name) + struct.pack("<IQ", 10, 2**60) for name in names(8, MAX_KEYS))) + bytes(64)
    ),
    "keys of the greatest length": lambda: gguf(
        0, 20_000, b"".join(text(name) + struct.pack("<IB", 0, 0) for name in names(1024, 20_000))
    ),
    "long strings": lambda: gguf(
        0, 30, b"".join(text(name) + struct.pack("<I", 8) + text(bytes(MAX_STRING_BYTES)) for name in names(2, 30))
    ),
    "arrays that are just kept": lambda: gguf(
        0, 500, b"".join(text(name) + struct.pack("<IIQ", 9, 12, MAX_ITEMS) + bytes(8 * MAX_ITEMS) for name in names(3, 500))
    ),
    "a million empty words": lambda: gguf(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 1_000_000) + bytes(8_000_000)),
    "words that reach far": lambda: gguf(
        0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 40) + b"".join(text(bytes(2**20)) for _ in range(40))
    ),
}


@pytest.mark.parametrize("case", GREEDY)
def test_headers_that_ask_for_much_get_little(tmp_path: Path, case: str) -> None:
    assert MAX_KEPT < GGUF_BOUND
    path = tmp_path / "greedy.gguf"
    path.write_bytes(GREEDY[case]())
    with bounded(GGUF_BOUND):
        check(path)
    path.unlink()


def test_a_header_without_end_is_left_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "endless.gguf"
    path.write_bytes(gguf(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, 9_000_000)))
    os.truncate(path, 80_000_000)  # all of it empty words

    with pytest.raises(HeaderError, match="longer than the 67108864 bytes"):
        read_model(path)


@pytest.mark.parametrize(
    "entry",
    [b'{"a":{"dtype":"F32","shape":[' + b"1," * 4_000_000 + b'1],"data_offsets":[0,4]}}', b'{"' + b"a" * 8_000_000 + b'":{}}'],
    ids=["dimensions", "name"],
)
def test_a_long_entry_costs_no_more_than_its_text(tmp_path: Path, entry: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(entry)) + entry + bytes(4))

    assert not check(tmp_path)
