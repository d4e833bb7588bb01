"""Requests and answers of TGI, as data: what is asked, what is refused, and the shape of every answer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from tgi_flags import Options

VERSION = "3.3.7"
_FINGERPRINT = f"{VERSION}-native"
_REASONS = {"eos_token": "stop"}
"""What the OpenAI side calls an end; the others keep TGI's own word, also the one that OpenAI does not know."""


class Refused(Exception):
    """A request that gets an error: its status, TGI's word for the kind, and a sentence."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.message, "error_type": self.kind}

    @property
    def chat_event(self) -> dict[str, Any]:
        """The same within a stream of the OpenAI side."""
        return {"error": {"message": self.message, "http_status_code": self.status}}


class Plain(Exception):
    """An answer of the web framework itself: plain text."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status, self.text = status, text


@dataclass(slots=True)
class Job:
    """One generation."""

    inputs: str
    limit: int
    natural: bool = False
    """It ends by itself at `limit`: no number of tokens was asked for."""
    stops: tuple[str, ...] = ()
    seed: int | None = None
    details: bool = False
    full_text: bool = False
    prefill: bool = False
    top_n: int = 0
    stream: bool = False
    usage: bool = False
    tokens: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    started: float = field(default_factory=time.monotonic)
    first: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return len(words_of(self.inputs))

    @property
    def made(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(token["text"] for token in self.tokens)

    @property
    def whole_text(self) -> str:
        return (self.inputs if self.full_text else "") + self.text

    @property
    def done(self) -> bool:
        return self.made >= self.limit or self.stopped

    @property
    def finish_reason(self) -> str:
        return "stop_sequence" if self.stopped else "eos_token" if self.natural else "length"

    def add(self, text: str) -> dict[str, Any]:
        """One more token."""
        self.first = self.first or time.monotonic()
        token = {"id": 100 + self.made, "text": text, "logprob": -0.5, "special": False}
        self.tokens.append(token)
        self.stopped = any(stop in self.text for stop in self.stops)
        return token


def words_of(text: str) -> list[str]:
    return text.split()


def read_json(body: bytes, content_type: str) -> dict[str, Any]:
    """As the framework reads a body."""
    if content_type.partition(";")[0].strip() != "application/json":
        raise Plain(415, "Expected request with `Content-Type: application/json`")
    try:
        found = json.loads(body)
    except ValueError as problem:
        raise Plain(400, f"Failed to parse the request body as JSON: {problem}") from None
    if not isinstance(found, dict):
        raise Plain(422, "Failed to deserialize the JSON body into the target type: invalid type, expected struct")
    return found


def field_of(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise Plain(422, f"Failed to deserialize the JSON body into the target type: missing field `{name}` at line 1 column 2")
    return body[name]


def read_native(body: dict[str, Any], options: Options, natural: int, *, stream: bool) -> Job:
    """A request of `/generate` and its kin."""
    inputs = field_of(body, "inputs")
    asked = body.get("parameters") or {}
    if asked.get("temperature") is not None and asked["temperature"] <= 0:
        raise _invalid("`temperature` must be strictly positive")
    if asked.get("top_p") is not None and not 0 < asked["top_p"] < 1:
        raise _invalid("`top_p` must be > 0.0 and < 1.0")
    job = Job(
        inputs=inputs,
        limit=natural,
        natural=True,
        stops=tuple(asked.get("stop") or ()),
        seed=asked.get("seed") if asked.get("seed") is not None else 42 if asked.get("do_sample") else None,
        details=bool(asked.get("details")),
        full_text=bool(asked.get("return_full_text")),
        prefill=bool(asked.get("decoder_input_details")),
        top_n=asked.get("top_n_tokens") or 0,
        stream=stream,
    )
    return _bounded(job, asked.get("max_new_tokens"), options)


def read_chat(body: dict[str, Any], options: Options, natural: int) -> Job:
    """A request of `/v1/chat/completions`."""
    messages = field_of(body, "messages")
    if not messages:
        raise Refused(422, "template_error", "Template error: no messages")
    inputs = " ".join(_content(message) for message in messages)
    return _openai(body, inputs, options, natural)


def read_completion(body: dict[str, Any], options: Options, natural: int) -> list[Job]:
    """A request of `/v1/completions`, one job for each prompt."""
    prompts = field_of(body, "prompt")
    prompts = prompts if isinstance(prompts, list) else [prompts]
    if len(prompts) > options.max_client_batch_size:
        limit = options.max_client_batch_size
        raise _invalid(f"batch size {len(prompts)} is greater than the maximum allowed: {limit}")
    return [_openai(body, prompt, options, natural) for prompt in prompts]


def _openai(body: dict[str, Any], inputs: str, options: Options, natural: int) -> Job:
    stop = body.get("stop") or ()
    job = Job(
        inputs=inputs,
        limit=natural,
        natural=True,
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=body.get("seed"),
        stream=bool(body.get("stream")),
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )
    return _bounded(job, body.get("max_tokens"), options)


def _content(message: dict[str, Any]) -> str:
    found = message.get("content") or ""
    return found if isinstance(found, str) else " ".join(part.get("text", "") for part in found)


def _bounded(job: Job, asked: int | None, options: Options) -> Job:
    if asked is not None:
        if asked <= 0:
            raise _invalid("`max_new_tokens` must be strictly positive")
        job.limit, job.natural = asked, False
    given, most = job.prompt_tokens, options.max_total_tokens
    if not given and not job.inputs:
        raise _invalid("`inputs` cannot be empty")
    if given > options.max_input_tokens:
        raise _invalid(f"`inputs` must have less than {options.max_input_tokens} tokens. Given: {given}")
    if asked is not None and given + asked > most:
        sum_ = "`inputs` tokens + `max_new_tokens`"
        raise _invalid(f"{sum_} must be <= {most}. Given: {given} `inputs` tokens and {asked} `max_new_tokens`")
    job.limit = min(job.limit, most - given)
    return job


def _invalid(message: str) -> Refused:
    return Refused(422, "validation", f"Input validation error: {message}")


# --- answers ---


def generated(job: Job) -> dict[str, Any]:
    """The whole answer of `/generate`."""
    found: dict[str, Any] = {"generated_text": job.whole_text}
    if job.details:
        prefill = [{"id": 100 + n, "text": word, "logprob": -1.0 if n else None} for n, word in enumerate(words_of(job.inputs))]
        found["details"] = {
            "finish_reason": job.finish_reason,
            "generated_tokens": job.made,
            "seed": job.seed,
            "prefill": prefill if job.prefill else [],
            "tokens": job.tokens,
        }
        if job.top_n:
            found["details"]["top_tokens"] = [[token] * job.top_n for token in job.tokens]
    return found


def native_event(job: Job, token: dict[str, Any]) -> dict[str, Any]:
    """One event of `/generate_stream`; the last carries the whole text."""
    last = job.done
    details = {
        "finish_reason": job.finish_reason,
        "generated_tokens": job.made,
        "seed": job.seed,
        "input_length": job.prompt_tokens,
    }
    top = {"top_tokens": [token] * job.top_n} if job.top_n else {}
    return {
        "index": job.made,
        "token": token,
        **top,
        "generated_text": job.whole_text if last else None,
        "details": details if last else None,
    }


def usage(*jobs: Job) -> dict[str, int]:
    prompt, made = sum(job.prompt_tokens for job in jobs), sum(job.made for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _openai_head(kind: str, model: str) -> dict[str, Any]:
    return {"object": kind, "id": "", "created": int(time.time()), "model": model, "system_fingerprint": _FINGERPRINT}


def _finish(job: Job) -> str:
    return _REASONS.get(job.finish_reason, job.finish_reason)


def chat(job: Job, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": job.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(job)}
    return {**_openai_head("chat.completion", model), "choices": [choice], "usage": usage(job)}


def chat_chunk(job: Job, model: str, token: dict[str, Any]) -> dict[str, Any]:
    """The role is in every one of them."""
    delta = {"role": "assistant", "content": token["text"]}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": _finish(job) if job.done else None}
    return {**_openai_head("chat.completion.chunk", model), "choices": [choice], "usage": None}


def chat_usage(job: Job, model: str) -> dict[str, Any]:
    return {**_openai_head("chat.completion.chunk", model), "choices": [], "usage": usage(job)}


def completion(jobs: list[Job], model: str) -> dict[str, Any]:
    choices = [{"index": n, "text": job.text, "logprobs": None, "finish_reason": _finish(job)} for n, job in enumerate(jobs)]
    return {**_openai_head("text_completion", model), "choices": choices, "usage": usage(*jobs)}


def completion_chunk(job: Job, model: str, token: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The last one carries the usage, asked for or not."""
    choice = {"index": index, "text": token["text"], "logprobs": None, "finish_reason": _finish(job) if job.done else ""}
    return {**_openai_head("text_completion", model), "choices": [choice], **({"usage": usage(job)} if job.done else {})}


def tokenized(text: str) -> list[dict[str, Any]]:
    found, at = [], 0
    for number, word in enumerate(words_of(text)):
        start = text.index(word, at)
        at = start + len(word)
        found.append({"id": 100 + number, "text": word, "start": start, "stop": at})
    return found


def info(options: Options) -> dict[str, Any]:
    return {
        "model_id": options.model_id,
        "model_sha": None,
        "model_pipeline_tag": None,
        "max_concurrent_requests": options.max_concurrent_requests,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": options.max_input_tokens,
        "max_total_tokens": options.max_total_tokens,
        "validation_workers": 2,
        "max_client_batch_size": options.max_client_batch_size,
        "router": "text-generation-router",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }
