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
PEOPLES = ("/borrow", "/models/pull", "/api/pull", "/pulls", "/pulls/{id}", "/pulls/{id}/events")
"""They last for as long as the borrower stays, or go out into the world."""
MODELLESS = ("/", "/generate", "/generate_stream", "/info")
"""They name no model, which only a server with a single one accepts; the same paths below /tgi/{model} are asked."""
CONFIGS = ("/plan",)
"""Takes a whole config, which a schema cannot tell good from bad."""
STORED = ("/v1/responses/input_tokens",)
"""Lies below a path on which every method is refused with a reason, since nothing is stored."""
SETTINGS = """\
# What a model's engine does not offer is refused with 400 and the name of the ability, however well it was asked for.
[[operations]]
include-path-regex = "^/v1/(audio|images|rerank|responses|messages)"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403", "404", "409", "429", "5xx"]
"""


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
    left_out = [word for path in (*ENDLESS, *PEOPLES, *MODELLESS, *CONFIGS, *STORED) for word in ("--exclude-path", path)]
    program, settings = str(Path(sys.executable).with_name("schemathesis")), tmp_path / "settings.toml"
    settings.write_text(SETTINGS)
    limits = ["--max-examples", EXAMPLES, "--request-timeout", "60", "--max-time", "30", "--no-color"]
    argv = [
        program,
        "--config-file",
        str(settings),
        "run",
        f"{url}/openapi.json",
        "--url",
        url,
        "--checks",
        "all",
        *limits,
        *left_out,
    ]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
