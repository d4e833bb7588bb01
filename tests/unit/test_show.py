"""What `offloadctl models` says of each model: whose it is, how it is, and where it fits."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from offloadd.ctl.show import catalog_table


def entry(name: str, fits: str, *backends: tuple[str, str, bool], **changes: Any) -> dict[str, Any]:
    own = {
        "origin": "configured",
        "served": True,
        "state": "off",
        "fits": fits,
        "backends": [{"name": engine, "fits": there, "available": is_here} for engine, there, is_here in backends],
        "size_bytes": 8 * 2**30,
        "quantization": "Q4_K_M",
        "parameters": 8_030_000_000,
        "context": 4096,
        "capabilities": ["chat", "tools"],
        "usage": {"requests": 7},
        "reason": "no request wants it",
    }
    return {"id": name, "offloadd": {**own, **changes}}


def shown(*entries: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=250).print(catalog_table({"data": list(entries)}))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()[1:]]


def test_each_model_is_told_with_whether_it_fits_and_on_which_engine() -> None:
    assert shown(
        entry("runs", "now", ("llamacpp", "now", True), ("vllm", "never", True), state="ready", reason="runs-1 is ready"),
        entry("waits", "after eviction", ("llamacpp", "never", True), ("vllm", "after eviction", True)),
        entry("huge", "never", ("llamacpp", "never", True), ("vllm", "never", False)),
        entry("found", "now", ("llamacpp", "now", True), origin="discovered", served=False, size_bytes=None, parameters=None),
    ) == [
        "runs configured ready now llamacpp 8.0 GiB Q4_K_M 8.0B 4096 chat tools 7 runs-1 is ready",
        "waits configured off after eviction vllm 8.0 GiB Q4_K_M 8.0B 4096 chat tools 7 no request wants it",
        "huge configured off never llamacpp 8.0 GiB Q4_K_M 8.0B 4096 chat tools 7 no request wants it",
        "found discovered, not served off now llamacpp - Q4_K_M - 4096 chat tools 7 no request wants it",
    ]
