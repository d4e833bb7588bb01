"""What tests of dialects share: OpenAI's chunks, cutting of streams, recordings of real engines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from offloadd.proxy.dialects import sse, turns
from offloadd.proxy.dialects.base import Change

Object = dict[str, Any]

RECORDINGS = next(
    (found for parent in Path(__file__).resolve().parents if (found := parent / "shared" / "backends" / "recordings").is_dir()),
    Path("recordings"),
)
needs_recordings = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="recordings of real engines are not at hand")


def chunk(delta: Object | None = None, finish: str | None = None, **more: Any) -> Object:
    """A chat chunk."""
    return {"id": "chatcmpl-7", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}


def usage(prompt: int, made: int, cached: int = 0) -> Object:
    """The chunk with the counts."""
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "prompt_tokens_details": {"cached_tokens": cached}},
    }


def call(index: int, name: str = "", arguments: str = "", number: str = "") -> Object:
    """A delta of a tool call."""
    function = {**({"name": name} if name else {}), "arguments": arguments}
    return {"tool_calls": [{"index": index, **({"id": number} if number else {}), "function": function}]}


def stream(chunks: Iterable[Object]) -> bytes:
    """The bytes that an engine sends for these chunks."""
    return b"".join(map(sse.event, chunks)) + sse.DONE


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The data, cut at these places."""
    places = [0, *sorted({place % (len(data) + 1) for place in cuts}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def through(change: Change, pieces: Iterable[bytes]) -> bytes:
    """What comes out for these pieces, the end included."""
    return b"".join(map(change.feed, pieces)) + change.end()


def gathered(turn: turns.Turn, merge: turns.Merge, chunks: Iterable[Object]) -> Object:
    """The whole answer."""
    gathering = turns.TurnGathering(turn, merge)
    for each in chunks:
        gathering.add(each)
    assert gathering.error is None
    assert gathering.complete
    return gathering.answer()


def events(data: bytes) -> list[Object]:
    """The events of a stream; each must bear the name of its type where it has one."""
    out = []
    for block in data.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in lines and lines["data"] != "[DONE]":
            payload = json.loads(lines["data"])
            assert lines.get("event", payload.get("type")) == payload.get("type")
            out.append(payload)
    return out


def recorded(name: str) -> tuple[int, Object, bytes]:
    """Status, request body and answer body of a recording, such as `llamacpp/messages-stream.sse`."""
    text = (RECORDINGS / name).read_bytes()
    request, rest = text.split(b"### RESPONSE\n", 1)
    answer, _ = rest.rsplit(b"### META\n", 1)
    head, _, body = answer.partition(b"\n\n")
    sent = request.partition(b"\n\n")[2].strip()
    status = head.split()[1]
    try:
        asked = json.loads(sent)
    except ValueError:
        asked = {}  # no JSON, or too large to have been kept
    return int(status), asked, body
