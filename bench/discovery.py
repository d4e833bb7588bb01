"""How long the search for models takes, against the least that anybody could do: a stat and one header read for each file.

    python -m bench.discovery [--files 10000]

Everything is in one run and one process, floor and search in turns, with the files in the page cache. Times are the thread's own
time on a processor, its calls of the kernel included, so that whatever else runs on the machine counts little; of several rounds
the median. How long the event loop is held up is counted in the process's time too: what its other threads compute from the
moment in which the loop should have had its turn. On a busy machine put `chrt --fifo 1` before the command, or the loop's
thread waits for a processor as well.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from offloadd import eventloop
from offloadd.backends import discover
from offloadd.catalog import Catalog
from offloadd.chronicle import registry_of
from offloadd.config import SourceText, SystemSecrets, load
from offloadd.observe.snapshot import Observer
from offloadd.registry.content import content_of, content_of_model
from offloadd.registry.discovery.scan import Scanner
from offloadd.registry.discovery.stores import Store
from offloadd.registry.readers import read_model
from offloadd.registry.recorder import Recorder

ROUNDS = 3
QUICK_ROUNDS = 31
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
    folders = [str(folder), *(str(path) for path in folder.iterdir())]
    print(f"{len(every)} files, {len(models)} models, projectors and adapters in {len(folders)} folders")

    def header_floor() -> None:
        stat_all(every)
        for path in models:
            read_model(Path(path))

    cold, floor, raw = in_turns(lambda: Scanner(read_model).scan(stores), header_floor, lambda: read_all(every, files))
    (prints,) = in_turns(lambda: [content_of([Path(path)]) for path in files])
    print(f"cold scan            {cold * 1e3:8.0f} ms")
    print(f"  stat + header read {floor * 1e3:8.0f} ms   ratio {cold / floor:.2f} (bound 2.0)")
    print(f"  stat + 16 KiB read {raw * 1e3:8.0f} ms   ratio {cold / raw:.2f} (nothing parsed: for comparison)")
    print(f"  content marks alone{prints * 1e3:8.0f} ms   (part of the cold scan)")
    scanner = Scanner(read_model)
    first = scanner.scan(stores)
    read = scanner.read
    time.sleep(2.1)  # a folder that has just changed is listed once more
    scanner.scan(stores)
    warm, stats, more = in_turns(
        lambda: scanner.scan(stores), lambda: stat_all(every), lambda: stat_all(folders), rounds=QUICK_ROUNDS
    )
    assert scanner.scan(stores) is first or scanner.read == read
    print(f"warm rescan          {warm * 1e3:8.1f} ms")
    print(f"  stat alone         {stats * 1e3:8.1f} ms   ratio {warm / stats:.2f} (bound 1.2)")
    print(f"  and of the folders {more * 1e3:8.1f} ms   ratio {warm / (stats + more):.2f} (without it nobody knows what is new)")
    assert scanner.read == read, "a header was read again"
    memory(stores)
    asyncio.run(lag(folder))


def stat_all(paths: list[str]) -> None:
    for path in paths:
        os.stat(path)  # noqa: PTH116


def read_all(every: list[str], files: list[str]) -> None:
    stat_all(every)
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.pread(handle, 16384, 0)
        os.close(handle)


def in_turns(*works: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The median time of each, in turns, so that a noisy neighbour hits all alike."""
    times = [[elapsed(work) for work in works] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def elapsed(work: Callable[[], object]) -> float:
    gc.collect()
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


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


async def lag(folder: Path) -> None:
    """The longest that the event loop was held up from a cold scan to the models' being served, and without one for as long."""
    text = f"{{storage: {{models_path: [{folder}], data_dir: /nonexistent}}, discovery: {{serve: true, stores: []}}}}"
    backends = discover()
    desired = load([SourceText("bench.yaml", text)], backends=backends, secrets=SystemSecrets()).desired
    assert desired is not None
    recorder = Recorder(registry_of(desired.storage), time.time)
    landed = asyncio.Event()
    catalog = Catalog(lambda: desired, backends, recorder, landed.set)
    observer = Observer([], backends, read_model, content_of_model, known=catalog.facts)

    async def serve() -> None:
        """As the daemon does when files have come."""
        attending = asyncio.ensure_future(catalog.discovery.attend())
        await landed.wait()
        attending.cancel()
        await catalog.prepare(desired)
        await observer.refresh(lambda: catalog.specs, dict)
        catalog.publish()

    eventloop.settle()
    begun = time.perf_counter()
    busy = await ticks(serve())
    idle = await ticks(asyncio.sleep(time.perf_counter() - begun))
    served = len(catalog.desired.models)
    said = f"held up at most until all {served} are served ({idle * 1e3:.1f} ms idle; bound 20)"
    print(f"event loop           {busy * 1e3:8.1f} ms {said}")


async def ticks(work: object) -> float:
    task = asyncio.ensure_future(work)  # type: ignore[arg-type,type-var]
    longest, step = 0.0, 0.001
    while not task.done():
        begun = time.process_time()
        await asyncio.sleep(step)
        longest = max(longest, time.process_time() - begun - step)
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
