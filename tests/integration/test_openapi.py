"""The API does what its description says, whatever is sent to it: checked by schemathesis, all of its checks, stateful ones too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.servers import HOST
from tests.integration.daemon import Daemon, model, running

EXAMPLES = os.environ.get("OFFLOADD_API_EXAMPLES", "6")
ENDLESS = ("/events", "/logs/{instance}")
"""Streams that end when their client leaves."""
PEOPLES = ("/borrow",)
"""Lasts for as long as the borrower stays."""
NATIVE = ("/v1/messages", "/v1/messages/count_tokens")
"""Passed on to engines that speak it, which the stand-in does not; the real one is asked in tests/e2e."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("openapi")
    models = {"a": model(llamacpp={"embeddings": True}, parallel=8), "b": model(run="on-demand")}
    with running(folder, models) as found:
        found.wait_for("a")
        yield found


@pytest.mark.timeout(600)
def test_the_api_does_what_its_description_says(daemon: Daemon, tmp_path: Path) -> None:
    url = f"http://{HOST}:{daemon.port}"
    left_out = [word for path in (*ENDLESS, *PEOPLES, *NATIVE) for word in ("--exclude-path", path)]
    program = str(Path(sys.executable).with_name("schemathesis"))
    limits = ["--max-examples", EXAMPLES, "--request-timeout", "60", "--max-time", "120", "--no-color"]
    argv = [program, "run", f"{url}/openapi.json", "--url", url, "--checks", "all", *limits, *left_out]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
