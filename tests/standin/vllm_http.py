"""The API server of the vLLM stand-in: HTTP with vLLM's statuses, bodies and framing, and made-up tokens at a set pace."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import vllm_bodies as bodies
from aiohttp import hdrs, web
from llama_process import Knobs, Marks, crash, leave
from vllm_bodies import Job, Refused
from vllm_engine import Engine
from vllm_flags import Options

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_TEXT = "the night was calm and the sea lay still while a small boat drifted home under quiet stars"
_WORDS = _TEXT.split()
_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_STATES = {0: "awake", 1: "weights_offloaded", 2: "discard_all"}
_POLL_S = 0.02


class Ended(Exception):
    """The engine died, or was told to stop, while this request was being served; the text says how it shows."""


def serve(options: Options, knobs: Knobs, marks: Marks, listener: socket.socket, engine: Engine) -> None:
    """Listen, answer, and end as vLLM does."""
    asyncio.run(Server(options, knobs, marks, engine).run(listener))


def _say(text: str) -> None:
    os.write(1, f"(APIServer pid={os.getpid()}) INFO {time.strftime('%m-%d %H:%M:%S')} [standin.py:1] {text}\n".encode())


class Server:
    """All paths, and the batch that is generated."""

    def __init__(self, options: Options, knobs: Knobs, marks: Marks, engine: Engine) -> None:
        self._options, self._knobs, self._marks, self._engine = options, knobs, marks, engine
        self._created = int(time.time())
        self._ready_at = time.monotonic()
        self._running = self._waiting = 0
        self._turn = asyncio.Condition()
        self._asked = self._made = 0
        self._finished: dict[str, int] = {}
        self._asleep = 0
        self._parts: set[str] = set()
        """What of its memory sleeps."""
        self._blank = False
        """Whether its weights are gone: it then makes tokens that mean nothing."""
        self._ending = ""
        self._dead = False

    async def run(self, listener: socket.socket) -> None:
        """Until SIGTERM, or until the engine has died: both end with 0."""
        runner = web.AppRunner(
            self._app(), access_log=None, keepalive_timeout=5, handle_signals=False, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            if not self._knobs.ignore_term:
                loop.add_signal_handler(number, told.set)
        _say(f"Starting vLLM server on http://{self._options.host}:{self._options.port}")
        server = None
        if os.environ.get("STANDIN_STEAL_PORT") != "1":
            server = await loop.create_server(runner.server, sock=listener)
        os.write(2, b"INFO:     Application startup complete.\n")
        self._marks.write("ready")
        self._ready_at = time.monotonic()
        while not told.is_set() and not self._engine.ended:
            await asyncio.sleep(_POLL_S)
        if told.is_set():
            self._marks.write("term")
            await self._stop(server)
        else:
            self._dead = True
            await asyncio.sleep(0.3)
        leave(0)

    async def _stop(self, server: asyncio.Server | None) -> None:
        """Finish what may be finished; then the engine goes, and with it whatever still runs."""
        end = time.monotonic() + self._options.shutdown_s
        while self._running + self._waiting and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        if server is not None:
            server.close()
        os.kill(self._engine.pid, signal.SIGKILL)
        how = os.environ.get("STANDIN_TERM", "abort")
        hangs = how == "hang" or self._options.shutdown_s
        self._ending = "hang" if hangs else how
        while self._running + self._waiting:
            await asyncio.sleep(_POLL_S)  # hanging, it waits for its clients to leave

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28, middlewares=[self._outermost])
        text = {"/v1/chat/completions": self._chat, "/v1/completions": self._completions, "/invocations": self._chat}
        posts: dict[str, Handler] = {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        posts |= {"/v1/embeddings": self._embeddings} if self._options.pooling else text
        gets = {"/health": self._health, "/ping": self._health, "/version": self._version, "/load": self._load}
        gets |= {"/metrics": self._metrics, "/v1/models": self._models}
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            posts |= {"/sleep": self._sleep, "/wake_up": self._wake_up, "/collective_rpc": self._rpc}
            gets["/is_sleeping"] = self._is_sleeping
        app.add_routes([web.post(path, handler) for path, handler in posts.items()])
        app.add_routes([web.get(path, handler, allow_head=False) for path, handler in gets.items()])
        app.on_response_prepare.append(_headers)
        return app

    @web.middleware
    async def _outermost(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._marks.write(f"request {request.method} {request.path}")
        response = await self._answer(request, handler)
        if request.path not in self._options.quiet:
            line = f'INFO:     {request.remote}:0 - "{request.method} {request.path} HTTP/1.1" {response.status}\n'
            os.write(1, line.encode())
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._options.keys and request.path.startswith(_GUARDED) and not self._shows_key(request):
            return _json({"error": "Unauthorized"}, 401, {"x-unvaried": "1"})
        try:
            return await handler(request)
        except Refused as refusal:
            return _json(refusal.body, refusal.status)
        except Ended:
            return _json(bodies.engine_died(), 500)
        except web.HTTPMethodNotAllowed as problem:
            allowed = ", ".join(sorted(problem.allowed_methods))
            return _json({"detail": "Method Not Allowed"}, 405, {"allow": allowed})
        except web.HTTPNotFound:
            if request.path.endswith("/") and request.path != "/":
                where = f"http://{request.host}{request.path.rstrip('/')}"
                return web.Response(status=307, headers={"location": where})
            return _json({"detail": "Not Found"}, 404)

    def _shows_key(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        return scheme.lower() == "bearer" and key in self._options.keys

    # --- looking ---

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(status=503 if self._dead else 200)

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return _json({"version": "0.32.0"})

    async def _load(self, _request: web.Request) -> web.StreamResponse:
        tracked = "--enable-server-load-tracking" in self._options.switches
        return _json({"server_load": self._running + self._waiting if tracked else 0})

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        own = self._options
        return _json(bodies.models(own.names, own.model, own.context, self._created, own.adapters))

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        name = self._options.names[0]
        labels = f'engine="0",model_name="{name}"'
        rows = [
            f"vllm:num_requests_running{{{labels}}} {float(self._running)}",
            f"vllm:num_requests_waiting{{{labels}}} {float(self._waiting)}",
            *(
                f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {float(level == self._asleep)}'
                for level, state in _STATES.items()
            ),
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.0",
            f"vllm:generation_tokens_total{{{labels}}} {float(self._made)}",
            *(
                f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{name}"}} {float(number)}'
                for reason, number in self._finished.items()
            ),
        ]
        return web.Response(text="".join(f"{row}\n" for row in rows), content_type="text/plain")

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        bodies.check_model(body, self._askable())
        size = bodies.count(body.get("prompt") or " ".join(str(m.get("content")) for m in body.get("messages", ())))
        found = {"count": size, "max_model_len": self._options.context, "tokens": list(range(100, 100 + size)), "token_strs": None}
        return _json(found)

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return _json({"prompt": " ".join(_WORDS[token % len(_WORDS)] for token in body["tokens"])})

    # --- sleep ---

    async def _sleep(self, request: web.Request) -> web.StreamResponse:
        """It says so at once, whether or not any memory is freed; running requests are aborted."""
        level = request.query.get("level", "1")
        if level not in ("0", "1", "2"):
            said = "Input should be less than or equal to 2"
            raise bodies.invalid("less_than_equal", "query.level", said, level, ", 'ctx': {'le': 2}")
        if how := os.environ.get("STANDIN_SLEEP"):
            return await _spoilt(how)
        while request.query.get("mode") == "wait" and self._running + self._waiting:
            await asyncio.sleep(_POLL_S)
        self._asleep = int(level)
        self._parts = {"weights", "kv_cache"} if self._asleep else set()
        self._blank = self._options.sleeps and self._asleep == 2
        self._marks.write(f"sleep {level}")
        self._engine.order("sleep")
        return _json({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, request: web.Request) -> web.StreamResponse:
        """All of it, or a part of it by name: it generates again when no part is missing."""
        tags = request.query.getall("tags", [])
        self._marks.write(" ".join(["wake", *tags]))
        how = os.environ.get("STANDIN_WAKE")
        if how in ("fails", "hangs"):
            return await _spoilt(how)
        await asyncio.sleep(float(os.environ.get("STANDIN_WAKE_S", "0")))
        self._parts -= set(tags or self._parts)
        if not self._parts and how == "dies":
            self._engine.order("die")
            while not self._dead:  # it asks the engine to wake, and has no answer from it
                await asyncio.sleep(_POLL_S)
            return _json(bodies.engine_died(), 500)
        if not self._parts:
            self._engine.order("wake")
            self._asleep = 0
        return _json({"status": "awake", "tags": tags or None})

    async def _rpc(self, request: web.Request) -> web.StreamResponse:
        """Only what brings back the weights that level 2 has dropped; they need their memory for it."""
        method = (await self._body(request)).get("method")
        if method != "reload_weights" or "weights" in self._parts:
            return await _spoilt("fails")
        self._blank = False
        self._marks.write("reload")
        return _json({"results": [None]})

    async def _is_sleeping(self, _request: web.Request) -> web.StreamResponse:
        return _json({"is_sleeping": bool(self._asleep)})

    # --- generating ---

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, bodies.read_chat)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, bodies.read_completion)

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        bodies.check_model(body, self._askable())
        return _json(bodies.embeddings(body, self._options.names[0]))

    async def _serve(self, request: web.Request, read: Callable[..., Job]) -> web.StreamResponse:
        body = await self._body(request)
        job = read(body, self._askable(), self._options.context, self._knobs.answer_tokens)
        job.adapter = body["model"] if body.get("model") in self._options.adapters else ""
        if self._options.queue is not None and self._waiting >= self._options.queue:
            raise bodies.busy()
        self._asked += 1
        if self._asked == self._knobs.crash_on_request:
            crash("-11")
        if job.stream:
            return await self._stream(request, job)
        async for _ in self._tokens(job):
            pass
        return _json(bodies.whole(job, job.adapter or self._options.names[0]))

    def _askable(self) -> list[str]:
        return [*self._options.names, *self._options.adapters]

    async def _stream(self, request: web.Request, job: Job) -> web.StreamResponse:
        """Headers go out at once, also when the request has to wait."""
        name = job.adapter or self._options.names[0]
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        pending = bodies.first(job, name)
        try:
            async for token in self._tokens(job):
                if job.finish == "abort":
                    await _send(response, [*pending, bodies.aborted(job, name)])
                else:
                    await _send(response, [*pending, *bodies.piece(job, name, token)])
                pending = []
            if job.usage:
                await _send(response, [bodies.usage(job, name)])
        except Ended:
            await _send(response, [bodies.engine_died()])
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _tokens(self, job: Job) -> AsyncIterator[str]:
        """Wait for a seat, then make tokens. A client that leaves is noticed by its connection."""
        ended = "cancelled"
        self._waiting += 1
        try:
            async with self._turn:
                await self._turn.wait_for(lambda: self._running < self._options.seats)
                self._running += 1
        finally:
            self._waiting -= 1
        try:
            while job.finish is None:
                await self._step(job)
                if job.finish is None:
                    word = "!" if self._blank else _WORDS[job.made % len(_WORDS)]
                    job.add(word if not job.made else f" {word}")
                    self._made += 1
                    yield job.tokens[-1]
                else:
                    yield ""
            ended = "completed"
            self._finished[job.finish] = self._finished.get(job.finish, 0) + 1
        finally:
            self._marks.write(f"{ended} {job.made}")
            self._running -= 1
            async with self._turn:
                self._turn.notify_all()

    async def _step(self, job: Job) -> None:
        if self._knobs.crash_after_tokens and self._made >= self._knobs.crash_after_tokens:
            os.kill(self._engine.pid, signal.SIGKILL)
        end = time.monotonic() + self._knobs.token_s
        while True:
            if self._dead or self._ending == "error":
                raise Ended
            if self._ending == "abort":
                job.finish = "abort"
                return
            left = end - time.monotonic()
            held = self._hung or self._asleep or self._ending == "hang" or self._crashing
            if left <= 0 and not held:
                return
            await asyncio.sleep(_POLL_S if held else min(left, _POLL_S))

    @property
    def _crashing(self) -> bool:
        return bool(self._knobs.crash_after_tokens) and self._made >= self._knobs.crash_after_tokens

    @property
    def _hung(self) -> bool:
        after = self._knobs.hang_after_ready_s
        return after is not None and time.monotonic() >= self._ready_at + after

    async def _body(self, request: web.Request) -> dict[str, Any]:
        return bodies.read_json(await request.read(), request.headers.get(hdrs.CONTENT_TYPE, ""))


async def _spoilt(how: str) -> web.StreamResponse:
    while how == "hangs":
        await asyncio.sleep(60)
    return _json(bodies.engine_died(), 500)


async def _headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[hdrs.SERVER] = "uvicorn"
    if response.headers.pop("x-unvaried", None) is None:
        response.headers["vary"] = "Origin"
    if not response.body_length and response.content_type == "application/octet-stream":
        response.headers.pop(hdrs.CONTENT_TYPE, None)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_dump(value), status=status, headers={hdrs.CONTENT_TYPE: "application/json", **(headers or {})})


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


async def _send(response: web.StreamResponse, events: list[dict[str, Any]]) -> None:
    await response.write(b"".join(b"data: " + _dump(event) + b"\n\n" for event in events))
