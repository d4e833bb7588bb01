"""What engines answer, print and leave behind; and what is written of it into the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, cast

import msgspec

from offloadd.backends import discover
from offloadd.clock import SystemClock
from offloadd.errors import RequestError
from offloadd.journal import printable
from offloadd.journald import encode
from offloadd.proxy import headers
from offloadd.proxy.answer_heads import AnswerHeads, Head
from offloadd.proxy.dialects import anthropic_answers, ollama_answers, openai, openai_streams, plain, responses, sse, tgi, turns
from offloadd.proxy.dialects.base import Change, Gathering
from offloadd.proxy.dialects.refusals import engine_error, event_error
from offloadd.proxy.taps import Tap
from offloadd.proxy.upstream import MAX_HEAD, Connection
from offloadd.state.launch import ExitStatus, ProbeReply
from offloadd.turn import Receiver, Turn
from tests.fuzz.mutate import bent, cut, mutated, mutated_text
from tests.fuzz.of_requests import SPEC, TGI
from tests.fuzz.table import MIB, Parser

BACKENDS = discover()
_USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
_CALL = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
CHUNKS: list[Any] = [
    {
        "id": "1",
        "object": "chat.completion.chunk",
        "model": "x",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}],
    },
    {"id": "1", "choices": [{"index": 0, "delta": {"reasoning_content": "t"}, "finish_reason": None}]},
    {
        "id": "1",
        "choices": [
            {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": []}]}}
        ],
    },
    {"id": "1", "choices": [{"index": 0, "delta": {"tool_calls": [_CALL]}}]},
    {
        "id": "1",
        "choices": [{"index": 0, "text": "b", "logprobs": {"tokens": ["b"], "token_logprobs": [-1], "top_logprobs": [{"b": -1}]}}],
    },
    {
        "id": "1",
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "timings": {"prompt_n": 1, "predicted_n": 2, "predicted_per_second": 9.5},
    },
    {"id": "1", "choices": [], "usage": _USAGE},
]
ANTHROPIC: list[Any] = [
    {
        "type": "message_start",
        "message": {"id": "1", "type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 1}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "2", "name": "f", "input": {}}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{"}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
]
RESPONSES: list[Any] = [
    {"type": "response.created", "response": {"id": "1", "status": "in_progress", "output": []}},
    {"type": "response.output_item.added", "output_index": 0, "item": {"id": "i", "type": "message", "content": []}},
    {"type": "response.content_part.added", "item_id": "i", "content_index": 0, "part": {"type": "output_text", "text": ""}},
    {"type": "response.output_text.delta", "item_id": "i", "delta": "a"},
    {
        "type": "response.output_item.done",
        "item": {"id": "i", "type": "message", "content": [{"type": "output_text", "text": "a"}]},
    },
    {"type": "response.completed", "response": {"id": "1", "status": "completed", "output": [], "usage": {"output_tokens": 1}}},
]
ERRORS: list[Any] = [
    {"error": {"message": "m", "type": "t", "code": 500}},
    {"error": "text", "error_type": "generation"},
    {"detail": [{"loc": ["a"], "msg": "m"}]},
]
_ASKED = tgi.read(TGI[0])
_TIMES = ollama_answers.Times(created=lambda: "2026-01-01T00:00:00Z", spent=lambda: 1.0)
_Told = tuple[str, Sequence[Any], Callable[[], Change] | None, Callable[[], Gathering] | None]


def _turn(make: Callable[[], turns.Turn], encode_as: turns.Encode) -> Callable[[], Change]:
    return lambda: turns.TurnStream(make(), encode_as, "text/event-stream")


def _chat_turn() -> turns.Turn:
    return anthropic_answers.ChatTurn("1", "m")


def _native_turn() -> turns.Turn:
    return anthropic_answers.NativeTurn("1", "m")


def _ollama_turn() -> turns.Turn:
    return ollama_answers.OllamaTurn("m", _TIMES, True)


def _responses_turn() -> turns.Turn:
    return responses.ResponsesTurn("m", {"model": "m", "input": "a"})


DIALECTS: tuple[_Told, ...] = (
    ("OpenAI, repaired", CHUNKS, _turn(lambda: openai_streams.RepairTurn(model="m", id="1", choices=2), turns.as_events), None),
    ("OpenAI, whole", CHUNKS, None, lambda: openai.Collector(openai.CHAT, 2)),
    ("OpenAI's texts, whole", CHUNKS, None, lambda: openai.Collector(openai.COMPLETIONS)),
    (
        "Anthropic from OpenAI",
        CHUNKS,
        _turn(_chat_turn, turns.as_named_events),
        lambda: turns.TurnGathering(_chat_turn(), anthropic_answers.MessageMerge()),
    ),
    (
        "Anthropic's own",
        ANTHROPIC,
        _turn(_native_turn, turns.as_named_events),
        lambda: turns.TurnGathering(_native_turn(), anthropic_answers.MessageMerge()),
    ),
    (
        "Ollama",
        CHUNKS,
        _turn(_ollama_turn, turns.as_lines),
        lambda: turns.TurnGathering(_ollama_turn(), ollama_answers.LineMerge()),
    ),
    (
        "TGI",
        CHUNKS,
        _turn(lambda: tgi.GenerateTurn(_ASKED), turns.as_events),
        lambda: turns.TurnGathering(tgi.GenerateTurn(_ASKED), tgi.GenerateMerge(_ASKED)),
    ),
    (
        "responses",
        RESPONSES,
        _turn(_responses_turn, turns.as_named_events),
        lambda: turns.TurnGathering(_responses_turn(), responses.ResponseMerge()),
    ),
    ("offloadd's own", CHUNKS, lambda: plain.PlainStream({"model": "m"}), lambda: openai.Collector(openai.CHAT)),
)


def _stream(rng: Random, events: Sequence[Any]) -> bytes:
    """Events of which some are of wrong kinds, in an order of their own, and with bytes changed now and then."""
    told = [bent(rng, each) if rng.random() < 0.25 else each for each in events if rng.random() < 0.9]
    if rng.random() < 0.15:
        told.insert(rng.randrange(len(told) + 1), bent(rng, rng.choice(ERRORS)))
    if rng.random() < 0.2:
        rng.shuffle(told)
    data = b"".join(b"data: " + json.dumps(each).encode(errors="replace") + b"\n\n" for each in told) + b"data: [DONE]\n\n"
    return mutated(rng, [data], (b"data: ", b"\n\n", b": ", b"event: x\n"), most=rng.choice((0, 0, 0, 2)))


def _answers(dialect: _Told) -> Callable[[Random], None]:
    """A stream for the client, and the whole put together: BrokenStreamError, or bytes that are JSON events."""
    _, events, change_of, gather_of = dialect

    def streamed(rng: Random, data: bytes) -> None:
        assert change_of is not None
        change = change_of()
        try:
            for piece in cut(rng, data):
                with sse.understanding():
                    change.feed(piece)
            with sse.understanding():
                change.end()
        except sse.BrokenStreamError as error:
            change.fail(RequestError(502, "bad_answer", str(error)))

    def gathered(data: bytes) -> None:
        assert gather_of is not None
        gathering = gather_of()
        try:
            for payload in sse.EventReader().feed(data):
                with sse.understanding():
                    gathering.add(sse.decode(payload))
            if gathering.error is not None:
                event_error(gathering.error)
            elif gathering.complete:
                with sse.understanding():
                    msgspec.json.encode(gathering.answer())
        except sse.BrokenStreamError:
            return

    def run(rng: Random) -> None:
        data = _stream(rng, events)
        if change_of is not None:
            streamed(rng, data)
        if gather_of is not None:
            gathered(data)

    return run


def _split(rng: Random) -> None:
    """Where the pieces end makes no difference."""
    data = _stream(rng, CHUNKS)

    def payloads(pieces: Sequence[bytes]) -> list[bytes]:
        reader, found = sse.EventReader(), []
        for piece in pieces:
            found += reader.feed(piece)
        return found

    assert payloads(cut(rng, data)) == payloads([data])


class _Pool:
    def __init__(self) -> None:
        self.heads = AnswerHeads()
        self.turn = _AtOnce()

    def give_back(self, connection: Connection, *, keep: bool) -> None: ...

    def discard(self, connection: Connection) -> None: ...


class _Transport:
    def __init__(self) -> None:
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None: ...

    def writelines(self, data: Any) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _AtOnce(Turn):
    """Without a loop, whose turns it could be."""

    def answer(self, receiver: Receiver) -> None:
        receiver.received()


class _Taker:
    """What came of one answer."""

    def __init__(self, *, takes_whole: bool = False) -> None:
        self.takes_whole = takes_whole
        self.begun: Head | None = None
        self.body = b""
        self.ends: list[str] = []

    def begin(self, head: Head) -> None:
        assert self.begun is None
        self.begun = head
        with contextlib.suppress(headers.BrokenAnswerError):
            assert head.onward.count(b"\n") == head.onward.count(b"\r\n")

    def whole(self, head: Head, body: bytes) -> None:
        assert self.takes_whole
        self.begin(head)
        self.feed(body)
        self.finish(())

    def feed(self, piece: bytes) -> None:
        assert self.begun is not None
        assert not self.ends
        self.body += piece

    def finish(self, trailer: Any) -> None:
        self.ends.append("whole")
        headers.trailer_lines(trailer)

    def lost(self, error: Exception) -> None:
        self.ends.append("lost")

    def sign(self) -> None: ...

    def hold(self) -> None: ...

    def go_on(self) -> None: ...


_OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive, x-a\r\nX-A: b\r\n"
_ANSWERS = [
    _OK + b"Content-Length: 5\r\n\r\nabcde",
    _OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n3;e=x\r\nfgh\r\n0\r\nX-Trailer: y\r\n\r\n",
    _OK + b"\r\nabc",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00",
    b"HTTP/1.0 500 Oh\r\nContent-Length: 2\r\n\r\n{}",
]
_FRAMING = (
    b"Content-Length: 5\r\n",
    b"Content-Length: 6\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"\r\n",
    b"\n",
    b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n",
)


def _upstream(rng: Random) -> None:
    """One end, once; what is passed on has no line breaks of its own; and neither where the pieces end nor what is known of heads
    makes a difference to the body.
    """
    # How much a head may take is looked at between two reads, so longer answers do depend on those.
    data, bodiless = mutated(rng, _ANSWERS, _FRAMING)[:MAX_HEAD], rng.random() < 0.1
    found: list[Any] = []
    pool = _Pool()
    for pieces in (cut(rng, data), [data], [_ANSWERS[0]], [data], [data]):
        taker, transport = _Taker(takes_whole=len(found) >= 2), _Transport()
        connection = Connection(cast(Any, pool), "x")
        connection.connection_made(cast(asyncio.BaseTransport, transport))
        connection.send(taker, b"", None, bodiless=bodiless)
        for piece in pieces:
            if piece and not transport.closed:
                connection.data_received(piece)
        connection.connection_lost(None)
        assert len(taker.ends) == 1, taker.ends
        found.append((taker.ends, taker.body if taker.ends == ["whole"] else b""))
        if taker.begun is not None:
            try:
                head = headers.response_head(taker.begun.status, taker.begun.fields, b"")
            except headers.BrokenAnswerError:
                continue
            assert head.count(b"\n") == head.count(b"\r\n")
            assert b"\r\n\r\n" not in head
    del found[2]  # it was there to be learned from
    assert found[1:] == found[:-1], data


def _errors(rng: Random) -> None:
    """An engine's refusal, of whatever shape, becomes one of ours."""
    body = json.dumps(bent(rng, rng.choice(ERRORS))).encode(errors="replace")
    body = mutated(rng, [body, b"<html>no</html>", b"\xff\xfe"], most=rng.choice((0, 0, 4)))
    status = rng.choice((400, 401, 403, 404, 422, 424, 429, 500, 501, 503, 599))
    error = engine_error(status, body, "/v1/x", mutated_text(rng, ("1", "30", "x"), most=1))
    assert 400 <= error.status < 600
    assert len(error.message) < 20_000
    assert all(len(value) < 100 for value in error.headers.values())
    msgspec.json.encode(error.body)


def _probes(rng: Random) -> None:
    """Answers to probes, and what programs say of themselves."""
    listing = {"object": "list", "data": [{"id": "m", "max_model_len": 4096}], "models": [{"name": "m"}]}
    body = mutated(rng, [json.dumps(bent(rng, listing)).encode(errors="replace")], most=rng.choice((0, 3)))
    said = mutated_text(
        rng, ("Available devices:\n  CUDA0: NVIDIA A (1 MiB, 1 MiB free)\n", "version: 1 (a)\n", "ROCm0: AMD\nVulkan1: x")
    )
    for backend in BACKENDS.values():
        for path in ("/health", "/v1/models", "/slots"):
            backend.read_probe(SPEC, path, ProbeReply(status=rng.choice((None, 200, 404, 503)), body=body))
        backend.read_devices(said)


def _taps(rng: Random) -> None:
    """Counts that an answer tells are whole numbers that are not negative."""
    tap = Tap(SystemClock())
    for piece in cut(rng, _stream(rng, [*CHUNKS, *ANTHROPIC])):
        tap.feed(piece)
    found = tap.tokens()
    assert all(count is None or count >= 0 for count in (found.prompt, found.cached, found.completion))


_LOGS = (
    "llama_model_load: error loading model: check_tensor_dims: tensor 'x' not found",
    "error: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 9",
    "ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB",
    "ValueError: The model's max seq len (131072) is larger than the number of tokens that can be stored in KV cache (1024)",
    "RuntimeError: Engine core initialization failed. See root cause above.",
    "Error: ShardCannotStart",
    "error: invalid argument: --x",
    "OSError: [Errno 28] No space left on device: '/x'",
)


def _ends(rng: Random) -> None:
    """Whatever was printed last, an end has one cause, said in one line of a bounded length."""
    tail = tuple(printable_line(mutated_text(rng, _LOGS, ("{path}", "'", "error", "{0}", "%s"))) for _ in range(rng.randrange(50)))
    status = rng.choice((ExitStatus(code=1), ExitStatus(code=0), ExitStatus(signal=9), ExitStatus(signal=4), ExitStatus()))
    for backend in BACKENDS.values():
        cause = backend.explain_exit(status, tail, was_ready=rng.random() < 0.5)
        assert 0 < len(cause.message) < 2000
        assert "\n" not in cause.message


def printable_line(text: str) -> str:
    from offloadd.runtime.logs import printable as shown

    return shown(text)


def _journal(rng: Random) -> None:
    """What journald reads is what was given, field by field; a line of the text log stays one line."""
    texts = [mutated_text(rng, ("a", "<3>b", "c\nPRIORITY=0", "MESSAGE=x\n", '{"event": "x"}', "\x1b[2J")) for _ in range(4)]
    fields = [(name, text[:4000]) for name, text in zip(("MESSAGE", "OFFLOADD_MODEL", "OFFLOADD_EVENT", "X"), texts, strict=True)]
    assert _decoded(encode(fields)) == [(name, text.encode(errors="replace")) for name, text in fields]
    assert all(character == "\n" or character.isprintable() or ord(character) > 159 for character in printable(texts[0]))


def _decoded(data: bytes) -> list[tuple[str, bytes]]:
    """As systemd's protocol has it."""
    found = []
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest.startswith(b"\n")
            rest = rest[1:]
        found.append((name.decode(), value))
        data = rest
    return found


PARSERS = (
    Parser("events of a stream", "where pieces end makes no difference", _split, 1000),
    *(Parser(f"answers: {each[0]}", "BrokenStreamError, or an answer", _answers(each), 700, 64 * MIB) for each in DIALECTS),
    Parser("HTTP of engines", "one end, once; no header with a line break; where pieces end makes no difference", _upstream, 3000),
    Parser("errors of engines", "one of ours, with a status of an error", _errors, 1500),
    Parser("answers to probes", "ready, loading or silent", _probes, 1000),
    Parser("counts of tokens", "none, or not negative", _taps, 1000),
    Parser("ends of engines", "one cause in one line", _ends, 300),
    Parser("the log", "no field and no line passes for another", _journal, 1500),
)
