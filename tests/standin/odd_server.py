#!/usr/bin/env python3
"""A stand-in for a server with JSON of its own, unlike anybody's: for `inference.format` in the config.

`POST /say` takes a text or a dialog and answers whole, or with `drip` as lines; `POST /pour` sends events with all the text so far.
STANDIN_TOKEN_S is the time of a word, STANDIN_CUT_AFTER breaks streams off after so many words, in good order.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TEXT = "the night was calm and the sea lay still while a small boat drifted home under quiet stars"
_TOKEN_S = float(os.environ.get("STANDIN_TOKEN_S", "0.002"))
_CUT_AFTER = int(os.environ.get("STANDIN_CUT_AFTER", "0"))


class RefusedError(Exception):
    """What it says of a request that it does not understand."""


def _words(asked: dict[str, Any]) -> tuple[list[str], str]:
    """The words of the answer, and why it ends there."""
    knobs = asked.get("knobs", {})
    words = [word if place == 0 else f" {word}" for place, word in enumerate(_TEXT.split())]
    for until in knobs.get("until", []):
        if not isinstance(until, str):
            raise RefusedError("knobs.until must hold words")
        for place, word in enumerate(words):
            if until in word:
                return words[:place], "met"
    limit = knobs.get("limit", 1000)
    if not isinstance(limit, int) or limit > 50_000:
        raise RefusedError("knobs.limit is out of range")
    return (words[:limit], "ran out") if limit < len(words) else (words, "said it all")


def _read(asked: dict[str, Any]) -> int:
    """How many words were said to it; it takes nothing that it does not know."""
    unknown = set(asked) - {"words", "dialog", "law", "knobs", "drip", "who", "fixed"}
    if unknown:
        raise RefusedError(f"unknown: {', '.join(sorted(unknown))}")
    if not isinstance(asked.get("fixed"), list) or asked["fixed"][0].get("tone") is None:
        raise RefusedError("fixed[0].tone is missing")
    if ("words" in asked) == ("dialog" in asked):
        raise RefusedError("either words or dialog")
    if "words" in asked:
        return len(str(asked["words"]).split())
    if any(set(turn) != {"speaker", "line"} or turn["speaker"] not in ("human", "machine") for turn in asked["dialog"]):
        raise RefusedError("a turn of the dialog is not understood")
    return sum(len(turn["line"].split()) for turn in asked["dialog"]) + len(str(asked.get("law", "")).split())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Alive."""
        self._send(204 if self.path == "/alive" else 404, b"")

    def do_POST(self) -> None:
        """Speak."""
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
            spent = _read(asked)
            words, why = _words(asked)
        except (ValueError, KeyError, TypeError, AttributeError, RefusedError) as error:
            self._send(400, json.dumps({"problem": {"text": str(error)}}).encode())
            return
        counts = {"heard": spent, "spoken": len(words)}
        if self.path == "/pour":
            self._stream("text/event-stream", _poured(words, why, counts))
        elif asked.get("drip"):
            self._stream("application/json", _dripped(words, why, counts))
        else:
            time.sleep(_TOKEN_S * len(words))
            whole = {"results": [{"voice": "".join(words), "because": why}], "spent": counts, "problem": None}
            self._send(200, json.dumps(whole).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, kind: str, pieces: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for count, piece in enumerate(pieces):
            if _CUT_AFTER and count >= _CUT_AFTER:
                break
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(_TOKEN_S)
        self.wfile.write(b"0\r\n\r\n")


def _dripped(words: list[str], why: str, counts: dict[str, int]) -> Iterator[bytes]:
    """A line a word."""
    for word in words:
        yield json.dumps({"bit": word, "over": False}).encode() + b"\n"
    yield json.dumps({"bit": None, "over": True, "because": why, "spent": counts}).encode() + b"\n"


def _poured(words: list[str], why: str, counts: dict[str, int]) -> Iterator[bytes]:
    """An event a word, which has the words before it too."""
    for place in range(len(words)):
        yield b"event: more\ndata: " + json.dumps({"so_far": "".join(words[: place + 1])}).encode() + b"\n\n"
    last = {"so_far": "".join(words), "because": why, "spent": counts}
    yield b"event: last\ndata:" + json.dumps(last).encode() + b"\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), _Handler).serve_forever()
