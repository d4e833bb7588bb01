"""How long the search for models takes, against the least that anybody could do: a stat and one header read for each file.

    python bench/discovery.py [--files 10000]

Everything is in one run and one process, floor and search in turns, the best of several rounds each, with the files in the page
cache.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from offloadd.observe.devices.aside import aside
from offloadd.registry.content import content_of
from offloadd.registry.discovery.scan import Scanner
from offloadd.registry.discovery.stores import Store
from offloadd.registry.discovery.watch import Discovery
from offloadd.registry.readers import read_model

ROUNDS = 3
QUICK_ROUNDS = 20
LAYERS = 24
_STRING, _U32 = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    count = parser.parse_args().files
    folder = Path(tempfile.mkdtemp(prefix="offloadd-bench-"))
    try:
        make(folder, count)
        measure(folder)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path) -> None:
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".gguf", ".safetensors"))
    models = [path for path in files if path.endswith(".gguf") and ("-of-" not in path or "-00001-of-" in path)]
    models += sorted(str(path.parent) for path in folder.rglob("config.json"))
    every = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    stores = [Store("models_path", str(folder))]
    print(f"{len(every)} files, {len(models)} models, projectors and adapters in {len(list(folder.iterdir()))} folders")

    def header_floor() -> None:
        for path in every:
            os.stat(path)  # noqa: PTH116
        for path in models:
            read_model(Path(path))

    def raw_floor() -> None:
        for path in every:
            os.stat(path)  # noqa: PTH116
        for path in files:
            handle = os.open(path, os.O_RDONLY)
            os.pread(handle, 16384, 0)
            os.close(handle)

    def stat_floor() -> None:
        for path in every:
            os.stat(path)  # noqa: PTH116

    cold, floor, raw = in_turns(lambda: Scanner(read_model).scan(stores), header_floor, raw_floor)
    prints = best(lambda: [content_of([Path(path)]) for path in files])
    print(f"cold scan            {cold * 1e3:8.0f} ms")
    print(f"  stat + header read {floor * 1e3:8.0f} ms   ratio {cold / floor:.2f} (bound 2.0)")
    print(f"  stat + 16 KiB read {raw * 1e3:8.0f} ms   ratio {cold / raw:.2f} (nothing parsed: for comparison)")
    print(f"  content marks alone{prints * 1e3:8.0f} ms   (part of the cold scan)")
    scanner = Scanner(read_model)
    first = scanner.scan(stores)
    read = scanner.read
    time.sleep(2.1)  # a folder that has just changed is listed once more
    scanner.scan(stores)
    warm, stats = in_turns(lambda: scanner.scan(stores), stat_floor, rounds=QUICK_ROUNDS)
    assert scanner.scan(stores) is first or scanner.read == read
    print(f"warm rescan          {warm * 1e3:8.1f} ms")
    print(f"  stat alone         {stats * 1e3:8.1f} ms   ratio {warm / stats:.2f} (bound 1.2)")
    assert scanner.read == read, "a header was read again"
    memory(stores)
    asyncio.run(lag(stores))


def in_turns(*works: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The best time of each, in turns, so that a noisy neighbour hits all alike."""
    times = [[elapsed(work) for work in works] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def best(work: Callable[[], object]) -> float:
    return min(elapsed(work) for _ in range(ROUNDS))


def elapsed(work: Callable[[], object]) -> float:
    gc.collect()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def memory(stores: list[Store]) -> None:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    scanner = Scanner(read_model)
    scan = scanner.scan(stores)
    gc.collect()
    grown = process.memory_info().rss - before
    each = grown / max(1, len(scan.found))
    print(f"memory               {grown / 2**20:8.1f} MiB for {len(scan.found)} models, {each:.0f} bytes each")


async def lag(stores: list[Store]) -> None:
    """The longest that the event loop was held up during a cold scan in its thread, and without one for as long."""
    discovery = Discovery(stores=lambda: stores, read_shape=read_model, aside=aside, changed=lambda _: None)
    begun = time.perf_counter()
    busy = await ticks(discovery.first())
    idle = await ticks(asyncio.sleep(time.perf_counter() - begun))
    print(f"event loop           {busy * 1e3:8.1f} ms held up at most while it scans ({idle * 1e3:.1f} ms idle; bound 20)")


async def ticks(work: object) -> float:
    task = asyncio.ensure_future(work)  # type: ignore[arg-type,type-var]
    longest, step = 0.0, 0.001
    while not task.done():
        begun = time.perf_counter()
        await asyncio.sleep(step)
        longest = max(longest, time.perf_counter() - begun - step)
    await task
    return longest


def make(folder: Path, count: int) -> None:
    """Files of all kinds: six in ten are models of one file, the others come with companions, in parts or as folders."""
    for number in range(count // 10):
        place = folder / f"set-{number % 100:03}"
        place.mkdir(exist_ok=True)
        name = f"Model-{number}-7B"
        for quantization in range(5):
            gguf(place / f"{name}-Q{quantization + 2}_K.gguf", number * 10 + quantization)
        gguf(place / f"mmproj-{name}-f16.gguf", number, kind="mmproj")
        gguf(place / f"{name}-lora.gguf", number, kind="adapter")
        for part in (0, 1):
            gguf(place / f"{name}-split-0000{part + 1}-of-00002.gguf", number, split=(part, 2))
        hub = folder / f"hub-{number}"
        hub.mkdir()
        safetensors(hub)


def gguf(path: Path, seed: int, *, kind: str = "model", split: tuple[int, int] | None = None) -> None:
    architecture = "clip" if kind == "mmproj" else "llama"
    text = {"general.architecture": architecture, "general.name": path.stem, "tokenizer.chat_template": "{{ tools }}" * 20}
    if kind == "adapter":
        text |= {"general.type": "adapter", "adapter.type": "lora", "general.base_model.0.name": "none"}
    numbers = {
        "general.file_type": 15,
        "llama.block_count": LAYERS,
        "llama.context_length": 8192,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 1024,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "clip.vision.projection_dim": 256,
    }
    names = [f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in ("attn_q", "attn_k", "ffn_up")]
    if split is not None:
        numbers |= {"split.no": split[0], "split.count": split[1], "split.tensors.count": len(names)}
        names = names[split[0] :: split[1]]
    pairs = [_text(key) + struct.pack("<I", _STRING) + _text(value) for key, value in text.items()]
    pairs += [_text(key) + struct.pack("<II", _U32, value) for key, value in numbers.items()]
    tensors = [_text(name) + struct.pack("<IqqIQ", 2, 256, 64, 1, index * 32768) for index, name in enumerate(names)]
    head = b"GGUF" + struct.pack("<Iqq", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    head += bytes(-len(head) % 32)
    with path.open("wb") as file:
        file.write(head)
        file.write(seed.to_bytes(8, "little"))
        file.truncate(len(head) + len(tensors) * 32768)
    os.utime(path, (1e9, 1e9))


def safetensors(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}'
    )
    header = b'{"model.layers.0.w": {"dtype": "F16", "shape": [64, 64], "data_offsets": [0, 8192]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8192))
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


if __name__ == "__main__":
    main()
