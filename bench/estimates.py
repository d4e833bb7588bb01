"""Compare estimates of llama-server's memory with what a real llama-server reports, and write the table of docs/memory.md.

    python -m bench.estimates            all models and options, into docs/memory.md
    python -m bench.estimates --quick    a few, to the terminal only

It ends with 1 when an estimate misses its target.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.llama_buffers import Reported, measure
from bench.tiny_models import MODELS, OTHER, make
from offloadd.backends.memory import LlamaMemory, llama_memory
from offloadd.demo import find_model
from offloadd.registry.readers import read_model

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
MARKER = "<!-- Written by `python -m bench.estimates`; what stands below is replaced. -->"
TARGETS = {"weights": 1.0, "cache": 2.0, "total": 10.0}
"""Percent by which an estimate may miss."""
_PARTS = ("weights", "cache", "compute", "total")
_MIB = 2**20
_REAL = "SmolLM2-135M"


@dataclass(frozen=True)
class Options:
    """One way to start a server: the flags, and the same as arguments of the estimate."""

    flags: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return " ".join(self.flags)


def _options(context: int, parallel: int = 1, *flags: str, **arguments: Any) -> Options:
    return Options(("-c", str(context), "-np", str(parallel), *flags), {"context": context, "parallel": parallel, **arguments})


ALL = (
    _options(256),
    _options(1024),
    _options(4096),
    _options(16384),
    _options(8000, 3),
    _options(4096, 4),
    _options(4096, 4, "--kv-unified", kv_unified=True),
    _options(4096, 1, "-ub", "128", ubatch=128),
    _options(4096, 1, "-ub", "1024", ubatch=1024),
    _options(4096, 1, "-fa", "off", flash_attention=False),
    _options(4096, 1, "-ctk", "q8_0", "-ctv", "q8_0", cache_type_k="q8_0", cache_type_v="q8_0"),
    _options(4096, 2, "-ctk", "q8_0", "-ctv", "q4_0", cache_type_k="q8_0", cache_type_v="q4_0"),
    _options(4096, 1, "-ctk", "f32", "-ctv", "f32", cache_type_k="f32", cache_type_v="f32"),
    _options(4096, 1, "--swa-full", swa_full=True),
    _options(4096, 1, "--embeddings", "--pooling", "mean", embeddings=True),
)
FEW = (_options(4096, 4), _options(8192, 2, "--kv-unified", "-ub", "256", kv_unified=True, ubatch=256))
QUICK_MODELS = ("llama", "qwen3moe", "gemma3", "deepseek2", "jamba")


@dataclass(frozen=True)
class Row:
    """One model under one set of options: estimate and report, in MiB."""

    model: str
    options: Options
    estimated: Mapping[str, float]
    reported: Mapping[str, float]

    def error(self, part: str) -> float:
        """Percent by which the estimate is above (or, negative, below) the report."""
        # The server prints two digits, so the comparison does not pretend to know more.
        estimated, reported = round(self.estimated[part], 2), self.reported[part]
        if estimated == reported:
            return 0.0
        return 100 * (estimated / reported - 1) if reported else float("inf")

    @property
    def missed(self) -> tuple[str, ...]:
        return tuple(part for part, target in TARGETS.items() if abs(self.error(part)) > target)


def compare(name: str, path: Path, options: Options) -> Row:
    """Estimate, then start the real server and read. Raises RuntimeError when the server does not load the model."""
    memory = llama_memory(read_model(path), **options.arguments)
    return Row(name, options, _estimated(memory), _reported(measure(path, options.flags)))


def _estimated(memory: LlamaMemory) -> dict[str, float]:
    parts = {"weights": memory.weights, "cache": memory.cache, "compute": memory.compute, "output": memory.output_buffer}
    sizes = {name: size / _MIB for name, size in parts.items()}
    return {**sizes, "total": sum(sizes.values())}


def _reported(reported: Reported) -> dict[str, float]:
    return {
        "weights": reported.weights,
        "cache": reported.cache,
        "compute": reported.compute,
        "output": reported.output,
        "total": reported.total,
    }


def rows(*, quick: bool) -> Iterator[Row]:
    """All comparisons; the models are made as they are needed and removed at once."""
    for options in FEW if quick else ALL:
        yield compare(_REAL, find_model(), options)
    with tempfile.TemporaryDirectory(prefix="offloadd-bench-") as folder:
        for name in QUICK_MODELS if quick else MODELS:
            yield from _rows_of(name, make(name, Path(folder)), FEW if quick else ALL)
            if not quick:
                yield from _rows_of(f"{name}, other sizes", make(name, Path(folder), OTHER), FEW)


def _rows_of(name: str, path: Path, options: Sequence[Options]) -> Iterator[Row]:
    latent = any(layer.k_row and not layer.v_row for layer in read_model(path).layers)
    for each in options:
        # With latent attention values are read out of the keys' cache: the server refuses a type of their own.
        if not (latent and each.arguments.get("cache_type_k") != each.arguments.get("cache_type_v")):
            yield compare(name, path, each)
    path.unlink()


def table(found: Sequence[Row]) -> str:
    """Markdown: the summary, then every row."""
    held_out = [row for row in found if row.model == _REAL or row.model.endswith("other sizes")]
    lines = [f"{len(found)} starts of a real llama-server with {len({row.model for row in found})} models.", ""]
    lines += ["| error in % | weights | cache | compute | total |", "| --- | --: | --: | --: | --: |"]
    for title, some in (("all", found), ("second sizes and SmolLM2", held_out)):
        for kind, of in (("largest", max), ("median", statistics.median)):
            cells = " | ".join(f"{of([abs(row.error(part)) for row in some]):.2f}" for part in _PARTS)
            lines.append(f"| {title}: {kind} | {cells} |")
    lines += ["", "Sizes in MiB, estimated / reported; errors in %, above zero where the estimate is too high.", ""]
    lines += ["| model | options | weights | cache | compute | total | weights % | cache % | compute % | total % |"]
    lines += ["| --- | --- " + "| --: " * 8 + "|"]
    return "\n".join([*lines, *map(_line, found), ""])


def _line(row: Row) -> str:
    sizes = " | ".join(f"{row.estimated[part]:.2f} / {row.reported[part]:.2f}" for part in _PARTS)
    errors = " | ".join(f"{row.error(part) + 0.0:.2f}" for part in _PARTS)
    return f"| {row.model} | `{row.options.text}` | {sizes} | {errors} |"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Compare memory estimates with what a real llama-server reports.")
    parser.add_argument("--quick", action="store_true", help="a few models, printed instead of written")
    quick = parser.parse_args().quick
    started = time.monotonic()
    found = list(rows(quick=quick))
    text = table(found)
    if quick:
        print(text)
    else:
        written = DOCUMENT.read_text().partition(MARKER)[0]
        DOCUMENT.write_text(f"{written}{MARKER}\n\n{text}")
        print("\n".join(text.splitlines()[:7]))
    misses = [f"{row.model} {row.options.text}: {', '.join(row.missed)}" for row in found if row.missed]
    print(f"{len(found)} rows in {time.monotonic() - started:.0f} s; beyond the targets: {len(misses)}", *misses, sep="\n")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
