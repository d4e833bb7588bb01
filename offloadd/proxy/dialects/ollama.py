"""Ollama's requests: what they mean for an engine that speaks OpenAI's dialect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from offloadd.errors import RequestError
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS
from offloadd.proxy.dialects.typed import decode
from offloadd.units import Seconds

Object = dict[str, Any]

EMBEDDINGS = "/v1/embeddings"
FOREVER = Seconds(float("inf"))


class Function(Struct):
    """A call of a tool; unlike OpenAI's, its arguments are an object and not text."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class ToolCall(Struct):
    """A call in an assistant's message."""

    function: Function
    id: str | None = None


class Message(Struct):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | None = ""
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class Asked(Struct):
    """What all requests that make text have in common."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None

    @property
    def streams(self) -> bool:
        """Here a stream is what one gets without asking."""
        return self.stream is not False


class ChatRequest(Asked):
    """`POST /api/chat`."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(Asked):
    """`POST /api/generate`."""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedRequest(Struct):
    """`POST /api/embed`, and the older `/api/embeddings` with a `prompt`."""

    model: str
    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class ShowRequest(Struct):
    """`POST /api/show`; `name` is the older word."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def chat(fields: Object) -> tuple[ChatRequest, Object]:
    """The request, and the chat completion that it means."""
    asked = decode(fields, ChatRequest)
    body: Object = {"messages": _messages(asked.messages)}
    if asked.tools:
        body["tools"] = asked.tools
    return asked, {**body, **_common(asked)}


def generate(fields: Object) -> tuple[GenerateRequest, str, Object]:
    """The request, and the path and body that it means: a chat, unless the prompt is to reach the model as it is."""
    asked = decode(fields, GenerateRequest)
    if asked.template is not None:
        message = "a template of the request's own is not supported; set chat_template_file in the config, or send raw: true"
        raise RequestError(400, "unsupported_capability", message, param="template")
    if asked.raw or asked.suffix is not None:
        suffix = {"suffix": asked.suffix} if asked.suffix is not None else {}
        return asked, COMPLETIONS, {"prompt": asked.prompt, **suffix, **_common(asked)}
    system = [Message(role="system", content=asked.system)] if asked.system else []
    messages = [*system, Message(role="user", content=asked.prompt, images=asked.images)]
    return asked, CHAT, {"messages": _messages(messages), **_common(asked)}


def embed(fields: Object) -> tuple[EmbedRequest, Object]:
    """The request, and OpenAI's that it means."""
    asked = decode(fields, EmbedRequest)
    wanted = asked.prompt if asked.input is None else asked.input
    if wanted is None:
        raise RequestError(400, "invalid_body", '"input" is missing: text, or a list of texts', param="input")
    dimensions = {"dimensions": asked.dimensions} if asked.dimensions else {}
    return asked, {"input": wanted, "encoding_format": "float", **dimensions}


def show(fields: Object) -> str:
    """The model that `POST /api/show` asks about."""
    asked = decode(fields, ShowRequest)
    return asked.model or asked.name or ""


# --- options ---

_RENAMED = {"num_predict": "max_tokens", "repeat_penalty": "repeat_penalty"}
_SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
_LLAMA = ("typical_p", "repeat_last_n", "mirostat", "mirostat_tau", "mirostat_eta", "num_keep", "penalize_newline", "tfs_z")
"""llama.cpp knows them by these names; other engines look at none of them."""
_CONFIG = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa", "low_vram", "f16_kv"}
)
"""How a model is loaded is the config's to say."""


def not_heeded(options: Object | None) -> tuple[str, ...]:
    """Options of the request that the config decides, to be told to the client."""
    return tuple(sorted(_CONFIG & set(options or ())))


def _common(asked: Asked) -> Object:
    options = asked.options or {}
    body = {name: options[name] for name in (*_SAME, *_LLAMA) if options.get(name) is not None}
    body |= {ours: options[name] for name, ours in _RENAMED.items() if options.get(name) is not None}
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] < 0:
        del body["max_tokens"]  # -1 and -2: until the model ends by itself, or its context is full
    if "repeat_penalty" in body:
        body["repetition_penalty"] = body["repeat_penalty"]  # vLLM's name of it
    return {**body, **_format(asked.format), **_think(asked.think)}


def _format(wanted: str | Object | None) -> Object:
    if not wanted:
        return {}
    if isinstance(wanted, dict):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted, "strict": True}}}
    if wanted != "json":
        raise RequestError(400, "invalid_body", '"format" is "json" or a JSON schema', param="format")
    return {"response_format": {"type": "json_object"}}


def _think(think: bool | str | None) -> Object:
    if think is None:
        return {}
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {"chat_template_kwargs": {"enable_thinking": bool(think), **effort}, **effort}


# --- messages ---

_KINDS = (("/9j/", "jpeg"), ("iVBOR", "png"), ("R0lGOD", "gif"), ("UklGR", "webp"), ("Qk", "bmp"))
"""How the base64 of a picture begins."""


def _messages(messages: Sequence[Message]) -> list[Object]:
    """OpenAI's messages. Ollama's calls need no ids: they are numbered here, and results find theirs by name, else in order."""
    out: list[Object] = []
    waiting: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        if message.tool_calls:
            calls = [_call(call, f"call_{number}_{place}") for place, call in enumerate(message.tool_calls)]
            waiting = [(call["function"]["name"], call["id"]) for call in calls]
            out.append({"role": message.role, "content": message.content or None, **_thoughts(message), "tool_calls": calls})
        elif message.role == "tool":
            out.append({"role": "tool", "tool_call_id": _answered(message, waiting), "content": message.content or ""})
        else:
            out.append({"role": message.role, "content": _content(message), **_thoughts(message)})
    return out


def _thoughts(message: Message) -> Object:
    return {"reasoning_content": message.thinking} if message.thinking else {}


def _call(call: ToolCall, number: str) -> Object:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return {"id": call.id or number, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _answered(message: Message, waiting: list[tuple[str, str]]) -> str:
    """The id of the call that this result is for."""
    name = message.tool_name or message.name
    found = next((pair for pair in waiting if pair[0] == name), None) or next(iter(waiting), None)
    if found is not None:
        waiting.remove(found)
    return message.tool_call_id or (found[1] if found else "call_0")


def _content(message: Message) -> str | list[Object]:
    if not message.images:
        return message.content or ""
    text = [{"type": "text", "text": message.content}] if message.content else []
    return [*text, *_pictures(message.images)]


def _pictures(images: Iterable[str]) -> Iterable[Object]:
    for image in images:
        kind = next((kind for start, kind in _KINDS if image.startswith(start)), "png")
        url = image if image.startswith("data:") else f"data:image/{kind};base64,{image}"
        yield {"type": "image_url", "image_url": {"url": url}}


# --- keep_alive ---

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)")


def keep_alive(given: float | str | None) -> Seconds | None:
    """How long the model is to stay after the request: 0 unloads it, FOREVER keeps it, None says nothing about it."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        try:
            given = float(given)
        except ValueError:
            given = _duration(str(given))
    return FOREVER if given < 0 else Seconds(given)


def _duration(text: str) -> float:
    """`1h30m` and the like, as Go writes durations."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
    parts = _DURATION.findall(rest)
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != rest:
        raise RequestError(
            400, "invalid_body", f'"keep_alive" is no duration: "{text[:32]}"; write 300, "5m", 0 or -1', param="keep_alive"
        )
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
