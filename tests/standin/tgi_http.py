"""The router of the TGI stand-in: HTTP with TGI's statuses, bodies and framing, and made-up tokens at a set pace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import tgi_bodies as bodies
from aiohttp import hdrs, web
from llama_process import Knobs, Marks, leave
from tgi_bodies import Job, Plain, Refused
from tgi_flags import Options

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_TEXT = "the night was calm and the sea lay still while a small boat drifted home under quiet stars"
_WORDS = _TEXT.split()
_KEEP_ALIVE_S = 15.0
_GUARDED = {"/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize"}


def serve(options: Options, knobs: Knobs, shards: list[int]) -> None:
    """Open the port and answer until SIGTERM; then close it, let running requests end, and leave with 0."""
    asyncio.run(_serve(Router(options, knobs, shards)))


async def _serve(router: Router) -> None:
    options, marks = router.options, router.marks
    runner = web.AppRunner(router.app(), access_log=None, handle_signals=False, handler_cancellation=True)
    await runner.setup()
    try:
        server = await asyncio.get_running_loop().create_server(runner.server, options.hostname, options.port)
    except OSError as problem:
        os.write(2, f"Error: Failed to bind to addr {options.hostname}:{options.port}: {problem}\n".encode())
        leave(1)
    router.ready_at = time.monotonic()
    os.write(1, b"Connected\n")
    marks.write("ready")
    told = asyncio.Event()
    if not router.knobs.ignore_term:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()
    server.close()
    while router.in_flight:
        await asyncio.sleep(0.02)
    leave(0)


class Router:
    """All paths, and the batch that is generated."""

    def __init__(self, options: Options, knobs: Knobs, shards: list[int]) -> None:
        self.options, self.knobs, self._shards = options, knobs, shards
        self.marks = Marks(knobs.mark_file)
        self.ready_at = 0.0
        self.in_flight = 0
        self._queued = 0
        self._running = 0
        self._turn = asyncio.Condition()
        self._asked = 0
        self._made = 0
        self._counters: dict[str, float] = {}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=self.options.number("--payload-limit", 2_000_000))
        posts = {
            "/": self._compatible,
            "/generate": self._generate,
            "/generate_stream": self._generate_stream,
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/invocations": self._invocations,
            "/tokenize": self._tokenize,
            "/chat_tokenize": self._chat_tokenize,
        }
        gets = {
            "/": self._health,
            "/health": self._health,
            "/ping": self._health,
            "/info": self._info,
            "/metrics": self._metrics,
            "/v1/models": self._models,
        }
        app.add_routes([web.post(path, self._guarded(path, handler)) for path, handler in posts.items()])
        app.add_routes([web.get(path, self._guarded(path, handler)) for path, handler in gets.items()])
        app.middlewares.append(_as_the_framework)
        app.on_response_prepare.append(_headers)
        return app

    def _guarded(self, path: str, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.marks.write(f"request {request.method} {request.path}")
            key = self.options.api_key
            given = request.headers.get(hdrs.AUTHORIZATION, "")
            if key and request.method == "POST" and path in _GUARDED and given.lower() != f"bearer {key}".lower():
                return web.Response(status=401)
            try:
                return await handler(request)
            except Refused as refusal:
                self._count(f'tgi_request_failure{{err="{refusal.kind}"}}')
                return _json(refusal.body, refusal.status)
            except Plain as answer:
                return web.Response(status=answer.status, text=answer.text)

        return handle

    # --- looking ---

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        if self._hung:
            await asyncio.Event().wait()
        return web.Response()

    async def _info(self, _request: web.Request) -> web.StreamResponse:
        return _json(bodies.info(self.options))

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        name = self.options.model_id
        return _json({"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": name}]})

    async def _metrics(self, _request: web.Request) -> web.StreamResponse:
        """A gauge or counter appears with its first use."""
        found = dict(self._counters)
        if self._asked:
            found |= {"tgi_queue_size": self._queued, "tgi_batch_current_size": self._running}
            found |= {"tgi_batch_max_total_tokens": self.options.max_batch_total_tokens}
        text = "".join(f"{name} {value:g}\n" for name, value in found.items())
        return web.Response(text=text, content_type="text/plain")

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        return _json(bodies.tokenized(bodies.field_of(await self._body(request), "inputs")))

    async def _chat_tokenize(self, request: web.Request) -> web.StreamResponse:
        job = bodies.read_chat(await self._body(request), self.options, 1)
        return _json({"tokenize_response": bodies.tokenized(job.inputs), "templated_text": job.inputs})

    # --- generating ---

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        job = self._native(await self._body(request), stream=False)
        await self._run(job)
        return _json(bodies.generated(job), headers=_times(job))

    async def _generate_stream(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._native_stream(request, body)

    async def _compatible(self, request: web.Request) -> web.StreamResponse:
        """`POST /`: a whole answer is a list of one."""
        body = await self._body(request)
        if body.get("stream"):
            return await self._native_stream(request, body)
        job = self._native(body, stream=False)
        await self._run(job)
        return _json([bodies.generated(job)], headers=_times(job))

    async def _invocations(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await (self._compatible(request) if "inputs" in body else self._chat(request))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if body.get("stream"):
            bodies.field_of(body, "messages")
            return await self._openai_stream(request, lambda: [self._read_chat(body)], self._chat_events)
        job = self._read_chat(body)
        await self._run(job)
        return _json(bodies.chat(job, self.options.model_id), headers=_times(job))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if body.get("stream"):
            bodies.field_of(body, "prompt")
            return await self._openai_stream(request, lambda: self._read_completion(body), self._completion_events)
        jobs = self._read_completion(body)
        for job in jobs:
            await self._run(job)
        return _json(bodies.completion(jobs, self.options.model_id), headers=_times(jobs[0]))

    def _native(self, body: dict[str, Any], *, stream: bool) -> Job:
        return bodies.read_native(body, self.options, self.knobs.answer_tokens, stream=stream)

    def _read_chat(self, body: dict[str, Any]) -> Job:
        return bodies.read_chat(body, self.options, self.knobs.answer_tokens)

    def _read_completion(self, body: dict[str, Any]) -> list[Job]:
        return bodies.read_completion(body, self.options, self.knobs.answer_tokens)

    async def _native_stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Errors come inside the stream, also those that are found before the first token; not a body that is no request at all."""
        bodies.field_of(body, "inputs")
        response = await _begin(request)
        async with _kept_alive(response):
            try:
                job = self._native(body, stream=True)
                async for token in self._tokens(job):
                    await _send(response, bodies.native_event(job, token))
            except Refused as refusal:
                await _send(response, refusal.body)
        await response.write_eof()
        return response

    async def _openai_stream(
        self, request: web.Request, read: Callable[[], list[Job]], events: Callable[[Job, int], AsyncIterator[dict[str, Any]]]
    ) -> web.StreamResponse:
        response = await _begin(request)
        async with _kept_alive(response):
            try:
                for index, job in enumerate(read()):
                    async for event in events(job, index):
                        await _send(response, event)
            except Refused as refusal:
                await _send(response, refusal.chat_event)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _chat_events(self, job: Job, _index: int) -> AsyncIterator[dict[str, Any]]:
        async for token in self._tokens(job):
            yield bodies.chat_chunk(job, self.options.model_id, token)
        if job.usage:
            yield bodies.chat_usage(job, self.options.model_id)

    async def _completion_events(self, job: Job, index: int) -> AsyncIterator[dict[str, Any]]:
        async for token in self._tokens(job):
            yield bodies.completion_chunk(job, self.options.model_id, token, index)

    async def _run(self, job: Job) -> None:
        async for _ in self._tokens(job):
            pass

    async def _tokens(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Wait for a place in the batch, then make tokens; a client that leaves is dropped from it at the next step."""
        self._asked += 1
        if self._asked == self.knobs.crash_on_request:
            leave(1)
        if self.in_flight >= self.options.max_concurrent_requests:
            raise Refused(429, "overloaded", "Model is overloaded")
        self.in_flight += 1
        ended = "cancelled"
        try:
            async with self._place():
                while not job.done:
                    await self._step()
                    word = _WORDS[job.made % len(_WORDS)]
                    yield job.add(word if not job.made else f" {word}")
            ended = "completed"
            self._count("tgi_request_success")
            self._count("tgi_request_generated_tokens_sum", job.made)
        finally:
            self.in_flight -= 1
            self._count("tgi_request_count")
            if ended == "cancelled":
                self._count('tgi_request_failure{err="dropped"}')
            self.marks.write(f"{ended} {job.made}")

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        most = self.options.max_batch_size
        self._queued += 1
        try:
            async with self._turn:
                await self._turn.wait_for(lambda: most is None or self._running < most)
                self._running += 1
        finally:
            self._queued -= 1
        try:
            yield
        finally:
            async with self._turn:
                self._running -= 1
                self._turn.notify_all()

    async def _step(self) -> None:
        if self._hung:
            await asyncio.Event().wait()
        await asyncio.sleep(self.knobs.token_s)
        self._made += 1
        if self.knobs.crash_after_tokens and self._made >= self.knobs.crash_after_tokens:
            os.kill(self._shards[0], signal.SIGKILL)
            await asyncio.Event().wait()

    @property
    def _hung(self) -> bool:
        after = self.knobs.hang_after_ready_s
        return after is not None and time.monotonic() >= self.ready_at + after

    def _count(self, name: str, by: float = 1) -> None:
        self._counters[name] = self._counters.get(name, 0) + by

    async def _body(self, request: web.Request) -> dict[str, Any]:
        return bodies.read_json(await request.read(), request.headers.get(hdrs.CONTENT_TYPE, ""))


@web.middleware
async def _as_the_framework(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An unknown path is 404 and a wrong method 405, both without a body."""
    try:
        return await handler(request)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed) as answer:
        return web.Response(status=answer.status, headers={"Allow": answer.headers["Allow"]} if "Allow" in answer.headers else {})
    except web.HTTPRequestEntityTooLarge:
        return web.Response(status=413, text="Failed to buffer the request body: length limit exceeded")


async def _headers(request: web.Request, response: web.StreamResponse) -> None:
    """Neither the server's name nor its charset is said; who may read answers is everybody."""
    response.headers.popall(hdrs.SERVER, None)
    response.headers["vary"] = "origin, access-control-request-method, access-control-request-headers"
    response.headers["access-control-allow-origin"] = "*"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_dump(value), status=status, content_type="application/json", headers=headers)


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


async def _begin(request: web.Request) -> web.StreamResponse:
    headers = {"x-compute-type": "1-standin", "x-compute-characters": "0", "x-accel-buffering": "no", "cache-control": "no-cache"}
    response = web.StreamResponse(headers={**headers, hdrs.CONTENT_TYPE: "text/event-stream"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    return response


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + _dump(event) + b"\n\n")


@contextlib.asynccontextmanager
async def _kept_alive(response: web.StreamResponse) -> AsyncIterator[None]:
    """A comment every now and then, so that a silent stream is seen to live."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_S)
            await response.write(b":\n\n")

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()


def _times(job: Job) -> dict[str, str]:
    """What a whole answer says of its making: whole milliseconds, and seconds for the computing."""
    now = time.monotonic()
    total = int((now - job.started) * 1000)
    numbers = {
        "x-compute-time": now - job.started,
        "x-compute-characters": len(job.inputs),
        "x-total-time": total,
        "x-validation-time": 0,
        "x-queue-time": 0,
        "x-inference-time": total,
        "x-time-per-token": total // max(1, job.made),
        "x-prompt-tokens": job.prompt_tokens,
        "x-generated-tokens": job.made,
    }
    return {"x-compute-type": "1-standin", **{name: f"{value:g}" for name, value in numbers.items()}}
