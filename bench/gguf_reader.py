"""How long a header takes to read: `python -m bench.gguf_reader [FILE…]`, by default a real one and large made-up ones."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from offloadd.demo import find_model
from offloadd.registry.readers import read_model

_ROUNDS = 15


def large_vocabulary(path: Path, words: int, merges: int) -> Path:
    """A model that is all vocabulary."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{number}" for number in range(words)])
    writer.add_token_types([1] * words)
    if merges:
        writer.add_token_merges([f"wo rd{number}" for number in range(merges)])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def milliseconds(path: Path) -> float:
    """The median of some readings."""
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        read_model(path)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def main() -> None:
    """The command."""
    given = [Path(name) for name in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="offloadd-bench-") as folder:
        made = [(128_256, 0), (128_256, 280_147), (262_144, 0)]
        paths = given or [
            find_model(),
            *(large_vocabulary(Path(folder) / f"{words}-words-{merges}-merges.gguf", words, merges) for words, merges in made),
        ]
        for path in paths:
            print(f"{milliseconds(path):7.1f} ms  {path.name}")


if __name__ == "__main__":
    main()
