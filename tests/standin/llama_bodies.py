"""The bodies of llama-server's answers, field by field as recorded from build b10434. Pure: facts in, JSON-ready values out."""

from __future__ import annotations

import json
import random
import re
import string
import time
from dataclasses import dataclass, field
from typing import Any

FINGERPRINT = "b1-7e4c0a9"
_TOKEN = re.compile(r" ?\w{1,8}|[^\w\s]|\s")
_SAMPLERS = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
_PROMPT_OVERHEAD = 5
"""Tokens that the chat template adds to each message."""
Json = dict[str, Any]


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, **more: int) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "message": message, "type": kind, **more}}


def invalid(message: str) -> Refused:
    return Refused(400, "invalid_request_error", message)


def not_supported(what: str, flag: str) -> Refused:
    return Refused(501, "not_supported_error", f"This server does not support {what}. Start it with `{flag}`")


def tokens_of(text: str) -> list[str]:
    """Cut a text into what stands for tokens here: words of up to eight letters, with the space before them."""
    return _TOKEN.findall(text)


def parse_json(body: bytes) -> Any:
    """Read a request's body; what is not JSON is the server's error in llama-server's eyes."""
    try:
        return json.loads(body)
    except UnicodeDecodeError:
        where, why = f"line 1, column {len(body)}", "syntax error while parsing value - invalid string: ill-formed UTF-8 byte"
    except json.JSONDecodeError as problem:
        where, why = f"line {problem.lineno}, column {problem.colno}", f"syntax error while parsing value - {problem.msg}"
    if not body:
        where = "line 1, column 1"
        why = "attempting to parse an empty input; check that your input string or stream contains the expected JSON"
    raise Refused(500, "server_error", f"[json.exception.parse_error.101] parse error at {where}: {why}")


@dataclass(slots=True)
class Job:
    """One generation: what was asked for, and how far it is."""

    kind: str
    """`chat`, `text` (OpenAI completions) or `native`."""
    prompt_tokens: int
    limit: int
    """Tokens to generate."""
    finish: str
    """Why it will end: `length` or `stop`."""
    stream: bool = False
    include_usage: bool = False
    choices: int = 1
    prompt: str = ""
    stops: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: "chatcmpl-" + "".join(random.choices(string.ascii_letters + string.digits, k=32)))
    created: int = field(default_factory=lambda: int(time.time()))
    made: int = 0
    text: str = ""
    slot: int = -1
    task: int = 0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def add(self, token: str, now: float) -> None:
        self.made += 1
        self.text += token
        self.first_token = self.first_token or now
        self.last_token = now

    def usage(self) -> Json:
        return {
            "completion_tokens": self.made,
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.made,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def timings(self) -> Json:
        prompt_ms = round((self.first_token - self.started) * 1000, 3) + 0.001
        predicted_ms = round((self.last_token - self.first_token) * 1000, 3) + 0.001
        return {
            "cache_n": 0,
            "prompt_n": self.prompt_tokens,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / max(1, self.prompt_tokens),
            "prompt_per_second": self.prompt_tokens * 1000 / prompt_ms,
            "predicted_n": self.made,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(1, self.made),
            "predicted_per_second": self.made * 1000 / predicted_ms,
        }


# --- reading requests -------------------------------------------------------------------------------------------------------------


def read_job(kind: str, body: Any, *, slots: int, n_ctx: int, natural_length: int) -> Job:
    """Check a generation request in llama-server's order; `natural_length` is how long an answer is that nobody limits."""
    asked = body if isinstance(body, dict) else {}
    prompt = _chat_prompt(asked) if kind == "chat" else _text_prompt(asked)
    prompt_tokens = len(tokens_of(prompt)) + (_PROMPT_OVERHEAD * (1 + len(asked["messages"])) if kind == "chat" else 0)
    stream = _typed(asked, "stream", bool, "boolean") or False
    _typed(asked, "temperature", (int, float), "number")
    choices = _ranged(asked, "n", 1, slots) or 1
    limit = _limit(asked)
    if "top_logprobs" in asked and not asked.get("logprobs"):
        raise invalid("top_logprobs requires logprobs to be set to true")
    if prompt_tokens >= n_ctx:
        text = f"request ({prompt_tokens} tokens) exceeds the available context size ({n_ctx} tokens), try increasing it"
        raise Refused(400, "exceed_context_size_error", text, n_prompt_tokens=prompt_tokens, n_ctx=n_ctx)
    stops = asked.get("stop") or []
    return Job(
        kind=kind,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        limit=min(max(1, limit if limit is not None else natural_length), n_ctx - prompt_tokens),
        finish="stop" if limit is None else "length",
        stream=stream,
        include_usage=bool((asked.get("stream_options") or {}).get("include_usage")),
        choices=choices,
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
    )


def _chat_prompt(asked: Json) -> str:
    if "messages" not in asked:
        raise invalid("'messages' is required")
    if not isinstance(asked["messages"], list):
        raise invalid("Expected 'messages' to be an array")
    return "\n".join(_content(message.get("content")) for message in asked["messages"] if isinstance(message, dict))


def _content(content: Any) -> str:
    if not isinstance(content, list):
        return str(content or "")
    if any(isinstance(part, dict) and part.get("type") == "image_url" for part in content):
        text = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
        raise Refused(500, "server_error", text)
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def _text_prompt(asked: Json) -> str:
    if "prompt" not in asked:
        raise invalid("[json.exception.out_of_range.403] key 'prompt' not found")
    prompt = asked["prompt"]
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _limit(asked: Json) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "n_predict"):
        value = _ranged(asked, name, -1, 2147483647)
        if value is not None:
            return value if value >= 0 else None
    return None


def _ranged(asked: Json, name: str, low: int, high: int) -> int | None:
    value = _typed(asked, name, (int, float), "number")
    if value is not None and not low <= value <= high:
        raise invalid(f"Field '{name}': Value must be between {low} <= value <= {high}, but got {value}")
    return value


def _typed(asked: Json, name: str, kind: type | tuple[type, ...], called: str) -> Any:
    value = asked.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (called == "number" and isinstance(value, bool)):
        given = {bool: "boolean", str: "string", list: "array", dict: "object"}.get(type(value), "number")
        raise invalid(f"Field '{name}': [json.exception.type_error.302] type must be {called}, but is {given}")
    return value


# --- generations ------------------------------------------------------------------------------------------------------------------


def plain(job: Job, model: str, n_ctx: int) -> Json:
    """The whole answer of a request that does not stream."""
    if job.kind == "native":
        return native_end(job, model, job.text)
    if job.kind == "chat":
        choices = [
            {"finish_reason": job.finish, "index": index, "message": {"role": "assistant", "content": job.text}}
            for index in range(job.choices)
        ]
    else:
        choices = [{"text": job.text, "index": 0, "logprobs": None, "finish_reason": job.finish}]
    return {
        "choices": choices,
        "created": job.created,
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "object": "chat.completion" if job.kind == "chat" else "text_completion",
        "usage": job.usage(),
        "id": job.id,
        "timings": job.timings(),
    }


def first_chunks(job: Job, model: str) -> list[Json]:
    """What a stream sends before its first token: in a chat, the role."""
    return [_chunk(job, model, {"role": "assistant", "content": None}, None)] if job.kind == "chat" else []


def token_chunk(job: Job, model: str, token: str) -> Json:
    if job.kind == "native":
        made, evaluated = job.made, job.prompt_tokens
        some = {"index": 0, "content": token, "tokens": [token_id(token)], "stop": False, "id_slot": -1}
        return {**some, "tokens_predicted": made, "tokens_evaluated": evaluated}
    return _chunk(job, model, {"content": token} if job.kind == "chat" else token, None)


def last_chunks(job: Job, model: str) -> list[Json]:
    """What ends a stream, before `[DONE]`: usage has a chunk of its own in a chat, and rides on the last one elsewhere."""
    if job.kind == "native":
        return [native_end(job, model, "")]
    if job.kind == "text":
        return [{**_chunk(job, model, "", job.finish), "usage": job.usage(), "timings": job.timings()}]
    end = _chunk(job, model, {}, job.finish)
    if not job.include_usage:
        return [{**end, "timings": job.timings()}]
    return [end, {**end, "choices": [], "usage": job.usage(), "timings": job.timings()}]


def _chunk(job: Job, model: str, delta: Any, finish: str | None) -> Json:
    if job.kind == "chat":
        choice = {"finish_reason": finish, "index": 0, "delta": delta}
    else:
        choice = {"text": delta, "index": 0, "logprobs": None, "finish_reason": finish}
    kind = "chat.completion.chunk" if job.kind == "chat" else "text_completion"
    some = {"choices": [choice], "created": job.created, "id": job.id}
    return {**some, "model": model, "system_fingerprint": FINGERPRINT, "object": kind}


def native_end(job: Job, model: str, text: str) -> Json:
    return {
        "index": 0,
        "content": text,
        "tokens": [],
        "id_slot": job.slot,
        "stop": True,
        "model": model,
        "tokens_predicted": job.made,
        "tokens_evaluated": job.prompt_tokens,
        "generation_settings": settings(job, whole=True),
        "prompt": job.prompt,
        "has_new_line": "\n" in job.text,
        "truncated": False,
        "stop_type": "limit" if job.finish == "length" else "eos",
        "stopping_word": "",
        "tokens_cached": job.prompt_tokens + job.made - 1,
        "timings": job.timings(),
    }


def settings(job: Job | None, *, whole: bool) -> Json:
    """The sampling settings that /slots, /props and native answers carry; `whole` adds what only native answers show."""
    limit = job.limit if job else -1
    found: Json = {"seed": 4294967295, "temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_k": 40}
    found |= {"top_p": 0.95, "min_p": 0.05, "top_n_sigma": -1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "typical_p": 1.0}
    found |= {"repeat_last_n": 64, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    found |= {"dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64}
    if whole:
        found |= {"dry_sequence_breakers": ["\n", ":", '"', "*"]}
    found |= {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "adaptive_target": -1.0, "adaptive_decay": 0.9}
    if whole:
        found |= {"stop": list(job.stops) if job else []}
    found |= {"max_tokens": limit, "n_predict": limit, "n_keep": 0, "n_discard": 0, "ignore_eos": False}
    found |= {"stream": bool(job and job.stream)}
    if whole:
        found |= {"logit_bias": []}
    found |= {"n_probs": 0, "min_keep": 0}
    if whole:
        found |= {"grammar": "", "grammar_lazy": False, "grammar_triggers": [], "preserved_tokens": []}
    found |= {"chat_format": "Content-only", "reasoning_format": "none", "reasoning_in_content": False, "generation_prompt": ""}
    found |= {"samplers": _SAMPLERS, "speculative.types": "none", "timings_per_token": False, "post_sampling_probs": False}
    return found | {"backend_sampling": False, "lora": []}


# --- everything else --------------------------------------------------------------------------------------------------------------


def slot(number: int, n_ctx: int, job: Job | None, *, busy: bool) -> Json:
    """One entry of /slots; a slot that has never worked shows its first four fields only."""
    found: Json = {"id": number, "n_ctx": n_ctx, "speculative": False, "is_processing": busy}
    if job is None:
        return found
    decoded = {"has_next_token": busy, "has_new_line": "\n" in job.text, "n_remain": job.limit - job.made, "n_decoded": job.made}
    return found | {
        "id_task": job.task,
        "n_prompt_tokens": job.prompt_tokens + job.made,
        "n_prompt_tokens_processed": job.prompt_tokens,
        "n_prompt_tokens_cache": 0,
        "params": settings(job, whole=False),
        "next_token": [decoded],
    }


def models(aliases: list[str], tags: list[str], created: int, meta: Json) -> Json:
    name = aliases[0]
    details = {"parent_model": "", "format": "gguf", "family": "", "families": [""], "parameter_size": "", "quantization_level": ""}
    listed = {"name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model", "description": ""}
    listed |= {"tags": [""], "capabilities": ["completion"], "parameters": "", "details": details}
    entry = {"id": name, "aliases": aliases, "tags": tags, "object": "model", "created": created, "owned_by": "llamacpp"}
    return {"models": [listed], "object": "list", "data": [{**entry, "meta": meta}]}


def props(*, alias: str, path: str, ftype: str, slots: int, n_ctx: int, slots_on: bool, metrics_on: bool) -> Json:
    caps = ("object_arguments", "parallel_tool_calls", "preserve_reasoning", "reasoning_effort", "string_content", "system_role")
    caps += ("tool_calls", "tools", "typed_content")
    return {
        "default_generation_settings": {"params": settings(None, whole=False), "n_ctx": n_ctx},
        "total_slots": slots,
        "model_alias": alias,
        "model_ftype": ftype,
        "model_path": path,
        "modalities": {"vision": False, "video": False, "audio": False},
        "media_marker": "<__media__>",
        "endpoint_slots": slots_on,
        "endpoint_props": False,
        "endpoint_metrics": metrics_on,
        "ui": True,
        "ui_settings": {},
        "chat_template": "{{ messages }}",
        "chat_template_caps": {f"supports_{cap}": cap in ("string_content", "system_role") for cap in caps},
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "build_info": FINGERPRINT,
        "is_sleeping": False,
        "cors_proxy_enabled": False,
    }


_METRICS = (
    ("prompt_tokens_total", "counter", "Number of prompt tokens processed, excluding cached tokens"),
    ("prompt_tokens_cached_total", "counter", "Number of prompt tokens reused from the cache"),
    ("prompt_seconds_total", "counter", "Total time spent processing prompts"),
    ("tokens_predicted_total", "counter", "Number of generation tokens processed"),
    ("tokens_predicted_seconds_total", "counter", "Total time spent generating tokens"),
    ("n_decode_total", "counter", "Total number of llama_decode() calls, excluding speculative decoding and multimodal decoding"),
    ("n_tokens_max", "counter", "Largest observed sequence length (prompt + generation)"),
    ("spec_decode_num_draft_tokens_total", "counter", "Speculative: Total draft tokens generated"),
    ("spec_decode_num_accepted_tokens_total", "counter", "Speculative: Total draft tokens accepted by the target model"),
    ("spec_decode_num_drafts_total", "counter", "Speculative: Total speculative decoding verification steps"),
    ("prompt_tokens_seconds", "gauge", "Average prompt throughput in tokens/s"),
    ("predicted_tokens_seconds", "gauge", "Average generation throughput in tokens/s"),
    ("requests_processing", "gauge", "Number of requests processing"),
    ("requests_deferred", "gauge", "Number of requests deferred"),
    ("n_busy_slots_per_decode", "gauge", "Average number of busy slots per llama_decode() call"),
)


def metrics(values: dict[str, float]) -> str:
    lines = []
    for name, kind, text in _METRICS:
        lines.append(f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {values.get(name, 0):.6g}\n")
    return "".join(lines)


def token_id(token: str) -> int:
    return sum(token.encode()) % 49152


def embedding_inputs(asked: Any) -> list[str]:
    given = asked.get("input", asked.get("content")) if isinstance(asked, dict) else None
    if given is None:
        raise invalid('"input" or "content" must be provided')
    inputs = given if isinstance(given, list) else [given]
    if not inputs or any(not text for text in inputs):
        raise invalid("Input content cannot be empty")
    return [text if isinstance(text, str) else " ".join(map(str, text)) for text in inputs]


def vector(text: str, length: int) -> list[float]:
    """Numbers that depend on the text alone."""
    seed = random.Random(text)
    return [seed.uniform(-0.1, 0.1) for _ in range(length)]
