"""Every request has one fate: what was answered, refused, cancelled and failed adds up to what was sent, each with its numbers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.servers import until
from tests.integration.daemon import CHAT, Daemon, chat, model, running

TELLING = """\
import json, msgspec, sys
from offloadd.cli import main
from offloadd.registry.recorder import Recorder
def told(self, served, keep=Recorder.served, log=open(sys.argv.pop(1), "a")):
    print(json.dumps(msgspec.structs.asdict(served), default=str), file=log, flush=True)
    keep(self, served)
Recorder.served = told
main()
"""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line per request: what the registry is told of is written there too."""
    monkeypatch.setattr(
        "tests.integration.daemon._PATCHED", f"import sys; sys.argv.insert(1, {str(tmp_path / 'book')!r})\n{TELLING}"
    )
    return tmp_path / "book"


def told(book: Path, count: int) -> list[dict[str, Any]]:
    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []

    until(lambda: len(read()) >= count, f"{count} requests are told of")
    assert len(read()) == count
    return read()


def test_every_request_is_told_of_once(tmp_path: Path, book: Path) -> None:
    models = {"a": model(env={"STANDIN_TOKEN_S": 0.02}), "off": model(run="never")}
    with running(tmp_path, models, patches={"_": 0}) as daemon:
        daemon.wait_for("a")
        daemon.get("/health")
        assert daemon.chat("a", 5).status == 200
        assert daemon.events("a", 5)[-1] == "[DONE]"
        assert daemon.chat("nothing").status == 404
        assert daemon.chat("off").status == 409
        assert daemon.request("POST", CHAT, chat(), {"Host": "evil.example"}).status == 403
        assert daemon.chat("a", temperature="hot").status == 400
        daemon.get("/upstream/a/props")
        with daemon.stream("a", 500) as stream:
            stream.skip(3)
        until(lambda: daemon.load("a") == 0, "it is over")
        found = told(book, 8)
        assert broken(daemon) == "backend_lost"
        lost = told(book, 9)[-1]
    fates = [(one["path"], one["fate"], one["status"]) for one in found]
    assert fates == [
        (CHAT, "answered", 200),
        (CHAT, "answered", 200),
        (CHAT, "refused", 404),
        (CHAT, "refused", 409),
        (CHAT, "refused", 403),
        (CHAT, "answered", 400),
        ("/upstream/{model}/{path}", "answered", 200),
        (CHAT, "cancelled", 499),
    ]
    plain, streamed = found[:2]
    for one in (plain, streamed):
        assert (one["model"], one["backend"], one["dialect"]) == ("a", "llamacpp", "openai")
        assert (one["completion_tokens"], one["prompt_tokens"] > 0) == (5, True)
        assert 0 <= one["waited"] <= one["waited"] + one["first_byte"] <= one["duration"]
        assert one["tokens_per_second"] > 0
        assert "a-1 is ready" in one["reason"]
    assert (plain["streamed"], streamed["streamed"], streamed["chunks"] >= 5) == (False, True, True)
    assert (lost["fate"], lost["status"], "was lost" in lost["reason"]) == ("failed", 200, True)


def broken(daemon: Daemon) -> str:
    """How a stream ends whose server is killed."""
    with daemon.stream("a", 500) as stream:
        stream.skip(3)
        os.kill(daemon.pid("a"), signal.SIGKILL)
        return str(list(stream)[-1]["error"]["code"])
