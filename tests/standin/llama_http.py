"""The stand-in's HTTP: every path, with llama-server's statuses, headers, framing and connection handling."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import llama_bodies as bodies
from aiohttp import hdrs, web
from llama_bodies import Job, Refused
from llama_engine import ClientGone, Engine, Stopping
from llama_process import crash

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_JSON = "application/json; charset=utf-8"
_LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
_NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
_WRONG_KEY = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}
_WITHOUT_KEY = {"/", "/health", "/v1/health", "/models", "/v1/models"}
_WITHOUT_MAIN_LOOP = {"/", "/health", "/v1/health", "/models", "/v1/models"}
"""Paths that the HTTP threads answer by themselves, whatever the main loop does."""


def _shown_key(request: web.Request) -> str:
    bearer = request.headers.get("Authorization", "")
    return bearer.removeprefix("Bearer ") if bearer.startswith("Bearer ") else request.headers.get("X-Api-Key", "")


class Api:
    """Routes requests to handlers by exact method and path; anything else is 404, a wrong method too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._routes: dict[tuple[str, str], Handler] = {}
        self._key = os.environ.get("LLAMA_API_KEY", "")
        for method, paths, handler in self._table():
            for path in paths.split():
                self._routes[method, path] = handler

    def _table(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/", self._root),
            ("GET", "/health /v1/health", self._health),
            ("GET", "/models /v1/models", self._models),
            ("GET", "/props", self._props),
            ("POST", "/props", self._no_props),
            ("GET", "/slots", self._slots),
            ("GET", "/metrics", self._metrics),
            ("GET", "/lora-adapters", self._lora),
            ("POST", "/v1/chat/completions /chat/completions", self._generation("chat")),
            ("POST", "/v1/completions", self._generation("text")),
            ("POST", "/completion /completions", self._generation("native")),
            ("POST", "/v1/embeddings", self._embeddings),
            ("POST", "/embedding /embeddings", self._native_embeddings),
            ("POST", "/rerank /reranking /v1/rerank /v1/reranking", self._rerank),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/v1/chat/completions/input_tokens", self._input_tokens),
        ]

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._serve)
        app.on_response_prepare.append(_drop_date)
        return app

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self._engine.marks.write(f"request {request.method} {request.path}")
        try:
            return await self._answer(request)
        except Refused as refusal:
            return _json(request, refusal.body, refusal.status)
        except ClientGone:
            return web.Response()  # nobody reads it

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "OPTIONS":
            return _preflight(request)
        method = "GET" if request.method == "HEAD" else request.method
        handler = self._routes.get((method, request.path))
        if self._key and request.path not in _WITHOUT_KEY and _shown_key(request) != self._key:
            return _unread(request, _WRONG_KEY, 401)
        if not self._engine.loaded and request.path != "/":
            return _unread(request, _LOADING, 503)
        if handler is None:
            return _unread(request, _NOT_FOUND, 404)
        stuck = self._engine.hung and request.path not in _WITHOUT_MAIN_LOOP
        if stuck or (self._engine.dead and method == "POST"):
            await request.read()
            await self._engine.hang(_gone(request))
        return await handler(request)

    # --- what the HTTP threads answer alone ---

    async def _root(self, request: web.Request) -> web.StreamResponse:
        if "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, ""):
            return web.Response(text="<html></html>", content_type="text/html", headers=_headers(request))
        text = b"Error: gzip is not supported by this browser"
        return web.Response(body=text, status=415, headers=_headers(request, 415, "text/plain"))

    async def _health(self, request: web.Request) -> web.StreamResponse:
        found = _json(request, {"status": "ok"})
        if request.method == "HEAD":
            found.headers[hdrs.ACCEPT_RANGES] = "bytes"
        return found

    async def _models(self, request: web.Request) -> web.StreamResponse:
        file, options = self._engine.file, self._engine.options
        meta = {"vocab_type": 2, "n_vocab": file.n_vocab, "n_ctx": self._engine.n_ctx, "n_ctx_train": file.n_ctx_train}
        meta |= {"n_embd": file.n_embd, "n_params": file.n_params, "size": file.size, "ftype": file.ftype}
        return _json(request, bodies.models(options.aliases, options.tags, self._engine.created, meta))

    # --- what goes through the main loop ---

    async def _props(self, request: web.Request) -> web.StreamResponse:
        options = self._engine.options
        on = {"slots_on": "--no-slots" not in options.switches, "metrics_on": "--metrics" in options.switches}
        size = {"slots": options.slots, "n_ctx": self._engine.n_ctx}
        names = {"alias": self._engine.model, "path": options.model or "", "ftype": self._engine.file.ftype}
        return _json(request, bodies.props(**names, **size, **on))

    async def _no_props(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        raise bodies.not_supported("changing global properties", "--props")

    async def _slots(self, request: web.Request) -> web.StreamResponse:
        if "--no-slots" in self._engine.options.switches:
            raise bodies.not_supported("slots endpoint", "--slots")
        if request.query.get("fail_on_no_slot") == "1" and all(slot.busy for slot in self._engine.slots):
            raise Refused(503, "unavailable_error", "no slot available")
        n_ctx = self._engine.n_ctx
        return _json(request, [bodies.slot(slot.number, n_ctx, slot.job, busy=slot.busy) for slot in self._engine.slots])

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        if "--metrics" not in self._engine.options.switches:
            raise bodies.not_supported("metrics endpoint", "--metrics")
        headers = _headers(request, 200, "text/plain; version=0.0.4") | {"Process-Start-Time-Unix": "1685431510"}
        return web.Response(body=bodies.metrics(self._engine.metrics()).encode(), headers=headers)

    async def _lora(self, request: web.Request) -> web.StreamResponse:
        return _json(request, [])

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        asked = bodies.parse_json(await request.read())
        found = bodies.tokens_of(str(asked.get("content", "")))
        ids: list[Any] = [bodies.token_id(token) for token in found]
        if asked.get("with_pieces"):
            ids = [{"id": number, "piece": token} for number, token in zip(ids, found, strict=True)]
        return _json(request, {"tokens": ids})

    async def _input_tokens(self, request: web.Request) -> web.StreamResponse:
        job = self._read_job("chat", await request.read())
        return _json(request, {"input_tokens": job.prompt_tokens, "object": "response.input_tokens"})

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        asked, inputs = await self._read_inputs(request)
        in_base64 = asked.get("encoding_format") == "base64"
        length = self._engine.file.n_embd
        vectors: list[Any] = [bodies.vector(text, length) for text in inputs]
        if in_base64:
            vectors = [base64.b64encode(struct.pack(f"<{length}f", *vector)).decode() for vector in vectors]
        kind = {"object": "embedding"} | ({"encoding_format": "base64"} if in_base64 else {})
        data = [{"embedding": vector, "index": index, **kind} for index, vector in enumerate(vectors)]
        count = sum(len(bodies.tokens_of(text)) for text in inputs)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return _json(request, {"model": asked.get("model", self._engine.model), "object": "list", "usage": usage, "data": data})

    async def _native_embeddings(self, request: web.Request) -> web.StreamResponse:
        _, inputs = await self._read_inputs(request)
        length = self._engine.file.n_embd
        return _json(request, [{"index": index, "embedding": [bodies.vector(text, length)]} for index, text in enumerate(inputs)])

    async def _read_inputs(self, request: web.Request) -> tuple[dict[str, Any], list[str]]:
        body = await request.read()
        if "--embeddings" not in self._engine.options.switches:
            raise bodies.not_supported("embeddings", "--embeddings")
        asked = bodies.parse_json(body)
        return asked, bodies.embedding_inputs(asked)

    async def _rerank(self, request: web.Request) -> web.StreamResponse:
        asked = await request.read()
        if "--reranking" not in self._engine.options.switches:
            raise bodies.not_supported("reranking", "--reranking")
        found = bodies.parse_json(asked)
        results = [{"index": index, "relevance_score": -0.5 - index} for index, _ in enumerate(found["documents"])]
        usage = {"prompt_tokens": len(results), "total_tokens": len(results)}
        return _json(request, {"model": found.get("model"), "object": "list", "usage": usage, "results": results})

    # --- generation ---

    def _generation(self, kind: str) -> Handler:
        async def generate(request: web.Request) -> web.StreamResponse:
            raw = await request.read()
            job = self._read_job(kind, raw)
            engine = self._engine
            engine.requests += 1
            poison = engine.knobs.crash_on_text
            if engine.requests == engine.knobs.crash_on_request or (poison and poison.encode() in raw):
                crash("-11")
            engine.in_flight += 1
            try:
                return await self._run(request, job)
            finally:
                engine.in_flight -= 1

        return generate

    def _read_job(self, kind: str, body: bytes) -> Job:
        engine = self._engine
        limits = {"slots": engine.options.slots, "n_ctx": engine.n_ctx, "natural_length": engine.knobs.answer_tokens}
        return bodies.read_job(kind, bodies.parse_json(body), **limits)

    async def _run(self, request: web.Request, job: Job) -> web.StreamResponse:
        engine = self._engine
        outcome = "cancelled"
        slot = None
        try:
            slot = await engine.occupy(job, _gone(request))
            answer = await (self._stream(request, job) if job.stream else self._plain(request, job))
            outcome = "completed"
            return answer
        finally:
            if slot is not None:
                engine.vacate(slot)
            engine.marks.write(f"{outcome} {'stream' if job.stream else 'plain'} {job.made}")

    async def _plain(self, request: web.Request, job: Job) -> web.StreamResponse:
        try:
            async for _ in self._engine.tokens_of(job, _gone(request)):
                pass
        except Stopping:
            await self._engine.hang(_gone(request))  # it is never answered, and keeps us alive until its client leaves
        return _json(request, bodies.plain(job, self._engine.model, self._engine.n_ctx))

    async def _stream(self, request: web.Request, job: Job) -> web.StreamResponse:
        headers = _headers(request, 200, "text/event-stream") | {"X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(request)
        response.force_close()  # llama-server closes after the last chunk, and does not say so beforehand
        try:
            await self._write_stream(request, response, job)
        except ConnectionError:
            raise ClientGone from None
        except Stopping:
            await self._cut_at_next_ping(request, response)
        return response

    async def _write_stream(self, request: web.Request, response: web.StreamResponse, job: Job) -> None:
        model = self._engine.model
        pending = bodies.first_chunks(job, model)  # the role goes out together with the first token
        async for token in self._engine.tokens_of(job, _gone(request)):
            await response.write(_events([*pending, bodies.token_chunk(job, model, token)]))
            pending = []
        await response.write(_events(bodies.last_chunks(job, model)))
        if job.kind != "native":
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()

    async def _cut_at_next_ping(self, request: web.Request, response: web.StreamResponse) -> None:
        """After SIGTERM a stream falls silent, until a ping finds the server stopping: then it ends without its last chunk."""
        interval = self._engine.options.number("--sse-ping-interval", 30)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval):
                await self._engine.hang(_gone(request))
        await response.write(b":\n\n")
        if request.transport is not None:
            request.transport.close()
        raise ClientGone


def _gone(request: web.Request) -> Callable[[], bool]:
    return lambda: request.transport is None or request.transport.is_closing()


def _events(found: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + _dump(event) + b"\n\n" for event in found)


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _headers(request: web.Request, status: int = 200, content_type: str | None = None) -> dict[str, str]:
    """Errors say `Connection: close`, which llama-server then does not do when it has read the request to its end."""
    found = {"Server": "llama.cpp", "Access-Control-Allow-Origin": request.headers.get("Origin", "")}
    if content_type is not None:
        found[hdrs.CONTENT_TYPE] = content_type
    if status >= 400 or not request.keep_alive:
        found[hdrs.CONNECTION] = "close"
    else:
        found["Keep-Alive"] = "timeout=5, max=100"
    return found


def _json(request: web.Request, value: Any, status: int = 200) -> web.Response:
    return web.Response(body=_dump(value), status=status, headers=_headers(request, status, _JSON))


def _unread(request: web.Request, value: Any, status: int) -> web.Response:
    """Refuse before the body is read: then the connection does close."""
    found = _json(request, value, status)
    if request.body_exists:
        found.force_close()
    return found


def _preflight(request: web.Request) -> web.Response:
    allow = {"Credentials": "true", "Methods": "GET, POST, DELETE, OPTIONS", "Headers": "*"}
    headers = _headers(request, 200, "text/html") | {f"Access-Control-Allow-{name}": value for name, value in allow.items()}
    return web.Response(body=b"", headers=headers)


async def _drop_date(request: web.Request, response: web.StreamResponse) -> None:
    del response.headers[hdrs.DATE]
