"""Requests and answers of vLLM 0.32, as data: what is asked, what is refused and in which words, and the shape of every answer."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

FINGERPRINT = "vllm-0.32.0-57a4d114"
_BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
_MEDIA = "Unsupported Media Type: Only 'application/json' is allowed"


class Refused(Exception):
    """A request that gets an error: status, vLLM's word for its kind, message and field."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def refused(message: str, param: str | None = None, value: object = None) -> Refused:
    shown = "" if param is None else f" (parameter={param}, value={value})" if value is not None else f" (parameter={param})"
    return Refused(400, "BadRequestError", f"{message}{shown}", param)


def invalid(kind: str, loc: str, said: str, given: str, more: str = "") -> Refused:
    """What the validation library says."""
    found = f"{{'type': '{kind}', 'loc': '{loc}', 'msg': '{said}', 'input': '{given}'{more}}}"
    return Refused(400, "Bad Request", f"1 validation error:\n  {found}", loc)


def busy() -> Refused:
    return Refused(503, "Service Unavailable", _BUSY)


def engine_died() -> dict[str, Any]:
    said = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return {"error": {"message": said, "type": "InternalServerError", "param": None, "code": 500}}


@dataclass(slots=True)
class Job:
    """One generation, of `n` alike texts."""

    chat: bool
    prompts: list[str]
    limit: int
    natural: bool = False
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    each_usage: bool = False
    n: int = 1
    tokens: list[str] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | None = None
    adapter: str = ""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(8)}"

    @property
    def made(self) -> int:
        return len(self.tokens)

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def texts(self) -> int:
        return self.n * len(self.prompts)

    def add(self, token: str) -> None:
        self.tokens.append(token)
        hit = next((stop for stop in self.stops if stop in self.text), None)
        if hit is not None:
            self.finish, self.stop_reason = "stop", hit
        elif self.made >= self.limit:
            self.finish = "stop" if self.natural else "length"

    def counts(self, details: bool = False) -> dict[str, Any]:
        prompt, made = sum(map(count, self.prompts)), self.made * self.texts
        found: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made}
        return {**found, "prompt_tokens_details": None, "completion_tokens_details": None} if details else found


def count(text: str) -> int:
    return len(text.split())


def read_json(body: bytes, content_type: str) -> dict[str, Any]:
    if body and content_type.partition(";")[0].strip() != "application/json":
        raise Refused(400, "Bad Request", f"1 validation error:\n  {_MEDIA}")
    if not body:
        raise invalid("missing", "body", "Field required", "None")
    try:
        found = json.loads(body)
    except UnicodeDecodeError as problem:
        raise refused(f"There was an error parsing the body: {problem}") from None
    except json.JSONDecodeError as problem:
        more = f", 'ctx': {{'error': '{problem.msg}'}}"
        raise invalid("json_invalid", f"body.{problem.pos}", "JSON decode error", "<dict of 0 items>", more) from None
    if not isinstance(found, dict):
        said = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", said, f"<list of {len(found)} items>")
    return found


def check_model(body: dict[str, Any], names: list[str]) -> None:
    asked = body.get("model")
    if asked is not None and asked not in names:
        said = f"The model `{asked}` does not exist. Valid aliases: {', '.join(names)}."
        raise Refused(404, "NotFoundError", said, "model")


def read_chat(body: dict[str, Any], names: list[str], context: int, natural: int) -> Job:
    if "messages" not in body:
        raise invalid("missing", "body.messages", "Field required", f"<dict of {len(body)} items>")
    messages = body["messages"]
    if not isinstance(messages, list):
        raise invalid("list_type", "body.messages", "Input should be a valid list", str(messages))
    _check_types(body)
    check_model(body, names)
    if not messages:
        raise refused("Cannot apply chat template to an empty conversation. Provide at least one message.")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise refused("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    prompt = " ".join(_content(message) for message in messages)
    return _job(body, [prompt], context, natural, chat=True)


def read_completion(body: dict[str, Any], names: list[str], context: int, natural: int) -> Job:
    _check_types(body)
    check_model(body, names)
    prompt = body.get("prompt")
    if not prompt:
        raise refused("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return _job(body, prompt if isinstance(prompt, list) else [prompt], context, natural, chat=False)


def _content(message: dict[str, Any]) -> str:
    found = message.get("content") or ""
    return found if isinstance(found, str) else " ".join(part.get("text", "") for part in found)


def _check_types(body: dict[str, Any]) -> None:
    for name, kind, said in (
        ("max_tokens", "int_parsing", "Input should be a valid integer, unable to parse string as an integer"),
        ("temperature", "float_parsing", "Input should be a valid number, unable to parse string as a number"),
    ):
        if isinstance(body.get(name), str):
            raise invalid(kind, f"body.{name}", said, body[name])


def _job(body: dict[str, Any], prompts: list[str], context: int, natural: int, *, chat: bool) -> Job:
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    _check_sampling(body, most, context)
    longest = max(map(len, prompts))
    if longest > context * 6:
        said = f"This model's maximum context length is {context} tokens. However, your prompt contains {longest} characters"
        said += f" (more than {context * 6} characters, which is the upper bound for {context} input tokens)."
        raise refused(f"{said} Please reduce the length of the input prompt.", "input_text", longest)
    stop = body.get("stop") or ()
    options = body.get("stream_options") or {}
    return Job(
        chat=chat,
        prompts=prompts,
        limit=natural if most is None else most,
        natural=most is None,
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=bool(body.get("stream")),
        usage=bool(options.get("include_usage")),
        each_usage=bool(options.get("continuous_usage_stats")),
        n=body.get("n", 1),
    )


def _check_sampling(body: dict[str, Any], most: int | None, context: int) -> None:
    if most is not None and most < 1:
        raise refused(f"max_tokens must be at least 1, got {most}.", "max_tokens", most)
    if most is not None and most > context:
        said = f"max_tokens={most} cannot be greater than max_model_len={context}. Please request fewer output tokens."
        raise refused(said, "max_tokens", most)
    if body.get("n", 1) < 1:
        raise refused(f"n must be at least 1, got {body['n']}.")
    heat = body.get("temperature")
    if heat is not None and heat < 0:
        raise refused(f"temperature must be non-negative, got {float(heat)}.", "temperature", float(heat))
    if heat is not None and heat > 2:
        raise refused(f"temperature must be in [0, 2], got {float(heat)}.", "temperature", float(heat))
    part = body.get("top_p")
    if part is not None and not 0 < part <= 1:
        raise refused(f"top_p must be in (0, 1], got {float(part)}.", "top_p", float(part))


# --- answers ---

_NOTHING = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}


def whole(job: Job, model: str) -> dict[str, Any]:
    """The answer to a request that is no stream."""
    kind = "chat.completion" if job.chat else "text_completion"
    head = {"id": job.id, "object": kind, "created": job.created, "model": model}
    tail = {"service_tier": None, "system_fingerprint": FINGERPRINT, "usage": job.counts(details=True)}
    chat = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None} if job.chat else {}
    return {**head, "choices": [_choice(job, index) for index in range(job.texts)], **tail, **chat, **_NOTHING}


def _choice(job: Job, index: int) -> dict[str, Any]:
    end = {"finish_reason": job.finish, "stop_reason": job.stop_reason, "token_ids": None}
    if not job.chat:
        more = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
        return {"index": index, "text": job.text, "logprobs": None, **end, **more}
    nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    message = {"role": "assistant", "content": job.text, **nothing}
    return {"index": index, "message": message, "logprobs": None, **end, "routed_experts": None}


def _chunk(job: Job, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    usage = {"usage": job.counts()} if job.each_usage else {}
    return {"id": job.id, "object": kind, "created": job.created, "model": model, "choices": choices, **usage, **more}


def first(job: Job, model: str) -> list[dict[str, Any]]:
    """The role, for each text of a chat."""
    if not job.chat:
        return []
    delta = {"role": "assistant", "content": ""}
    return [
        _chunk(
            job,
            model,
            [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
            prompt_token_ids=None,
            prompt_text=None,
        )
        for index in range(job.texts)
    ]


def piece(job: Job, model: str, token: str) -> list[dict[str, Any]]:
    """One token of each text; the last carries the finish reason."""
    found = []
    for index in range(job.texts):
        end: dict[str, Any] = {"finish_reason": job.finish}
        if job.chat:
            choice = {"index": index, "delta": {"content": token}, "logprobs": None, **end}
            choice |= {"stop_reason": job.stop_reason} if job.finish else {}
            found.append(_chunk(job, model, [{**choice, "token_ids": None}]))
        else:
            choice = {"index": index, "text": token, "logprobs": None, **end, "stop_reason": job.stop_reason}
            found.append(_chunk(job, model, [{**choice, "prompt_token_ids": None, "token_ids": None}]))
    # Its fingerprint rides on the chunk that ends the stream.
    if job.finish and not job.usage:
        found[-1]["system_fingerprint"] = FINGERPRINT
    return found


def usage(job: Job, model: str) -> dict[str, Any]:
    return {**_chunk(job, model, []), "usage": job.counts(), "system_fingerprint": FINGERPRINT}


def aborted(job: Job, model: str) -> dict[str, Any]:
    """The chunk that a stream gets when the server is told to end."""
    job.finish = "abort"
    return piece(job, model, "")[0]


def models(names: list[str], root: str, context: int, created: int, adapters: dict[str, str]) -> dict[str, Any]:
    allow = {
        "create_engine": False,
        "sampling": True,
        "logprobs": True,
        "search_indices": False,
        "view": True,
        "fine_tuning": False,
    }
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": created,
        **{f"allow_{name}": value for name, value in allow.items()},
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    head = {"object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": None, "max_model_len": context}
    served = [{"id": name, **head, "permission": [permission]} for name in names]
    over = [{"id": name, **head, "root": path, "parent": names[0], "permission": [permission]} for name, path in adapters.items()]
    return {"object": "list", "data": served + over}


def embeddings(body: dict[str, Any], model: str) -> dict[str, Any]:
    """One short vector for each input."""
    if "input" not in body:
        raise invalid("missing", "body.input", "Field required", f"<dict of {len(body)} items>")
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    data = [{"index": number, "object": "embedding", "embedding": [0.6, 0.8]} for number, _ in enumerate(inputs)]
    tokens = sum(map(count, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {
        "id": f"embd-{secrets.token_hex(8)}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": usage,
    }
