"""The real llama-server and model, found as `offloadd demo` finds them; without them these tests are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offloadd import demo
from offloadd.errors import PermanentError

pytest.register_assert_rewrite("tests.integration.daemon")


@dataclass(frozen=True)
class Real:
    """How to run the real thing."""

    llamacpp: Mapping[str, Any]
    """Settings of the engine."""
    gguf: Path

    def model(self, **changes: Any) -> dict[str, Any]:
        """A model's settings. One thread: two that wait for each other on busy cores take many times as long."""
        options = {"threads": 1, "cache_ram": 0, **changes.pop("llamacpp", {})}
        usual = {"source": str(self.gguf), "run": "always", "context": 1024, "parallel": 2, "vram": "300MiB"}
        return {**usual, **changes, "llamacpp": options}


@pytest.fixture(scope="session")
def real() -> Real:
    try:
        command, env = demo.find_server()
        return Real({"command": [str(command)], "env": env}, demo.find_model())
    except PermanentError as missing:
        pytest.skip(f"{missing.message}: {missing.hint}")
