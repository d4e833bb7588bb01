"""OpenAI's answers: a stream's chunks collected into the answer that a client which did not ask for a stream expects.

llama-server ends the work of a client that leaves only when the answer is a stream. So a plain request is sent on as a streaming
one, and its chunks are put together here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_PER_TOKEN = ("timings_per_token", "return_progress", "echo", "verbose")
_OBJECTS = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}


def can_collect(path: str, body: Mapping[str, Any]) -> bool:
    """Whether the plain answer can be rebuilt exactly from a stream of this request."""
    if path not in _OBJECTS or body.get("n") not in (None, 1) or any(body.get(name) for name in _PER_TOKEN):
        return False
    return path == CHAT or isinstance(body.get("prompt"), str)


def as_stream(body: Mapping[str, Any]) -> Object:
    """The same request, streaming, with usage at the end."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


class Collector:
    """Puts the chunks of one stream together."""

    def __init__(self, path: str) -> None:
        self._chat = path == CHAT
        self._kind = _OBJECTS[path]
        self._head: Object = {}
        self._choice: Object = {"index": 0, "finish_reason": None}
        self._text: list[str] = []
        self._message: Object = {"role": "assistant"}
        self._texts: dict[str, list[str]] = {}
        self._calls: dict[int, Object] = {}
        self._logprobs: Object | None = None
        self._tail: Object = {}
        self.error: Object | None = None
        """The error object of an error event, if one came."""

    @property
    def complete(self) -> bool:
        """Whether the stream has said how it finished."""
        return self._choice["finish_reason"] is not None

    def add(self, chunk: Object) -> None:
        """Take one chunk in."""
        if "error" in chunk:
            self.error = chunk
            return
        self._head.update({key: value for key, value in chunk.items() if key not in ("choices", "usage", "timings", "object")})
        self._tail.update({key: chunk[key] for key in ("usage", "timings") if chunk.get(key) is not None})
        for choice in chunk.get("choices") or ():
            self._add_choice(choice)

    def answer(self) -> Object:
        """The whole answer, as if no stream had been asked for."""
        choice = {**self._choice, **({"message": self._full_message()} if self._chat else {"text": "".join(self._text)})}
        choice["logprobs"] = self._logprobs
        if self._logprobs is None and self._chat:
            del choice["logprobs"]
        return {**self._head, "object": self._kind, "choices": [choice], **self._tail}

    def _add_choice(self, choice: Object) -> None:
        if choice.get("finish_reason") is not None:
            self._choice["finish_reason"] = choice["finish_reason"]
        if choice.get("text"):
            self._text.append(choice["text"])
        if choice.get("logprobs"):
            self._logprobs = _joined(self._logprobs or {}, choice["logprobs"])
        for key, value in (choice.get("delta") or {}).items():
            self._add_delta(key, value)

    def _add_delta(self, key: str, value: Any) -> None:
        if key == "tool_calls":
            for call in value or ():
                self._add_call(call)
        elif key == "role":
            self._message["role"] = value
        elif isinstance(value, str):
            self._texts.setdefault(key, []).append(value)
        elif value is not None:
            self._message[key] = value

    def _add_call(self, delta: Object) -> None:
        """A call's first delta names it, the others add to its arguments."""
        known = self._calls.setdefault(delta.get("index", len(self._calls)), {"function": {"arguments": ""}})
        function = delta.get("function") or {}
        known["function"]["arguments"] += function.get("arguments") or ""
        known["function"].update({key: value for key, value in function.items() if key != "arguments" and value is not None})
        known.update({key: value for key, value in delta.items() if key not in ("index", "function") and value is not None})

    def _full_message(self) -> Object:
        texts = {key: "".join(parts) for key, parts in self._texts.items()}
        content = texts.pop("content", "")
        message = {**self._message, "content": content, **texts}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
            message["content"] = content or None
        return message


def _joined(old: Object, new: Object) -> Object:
    """Log probabilities of more tokens behind those so far; lists grow, anything else is replaced."""
    return {key: [*old.get(key, ()), *value] if isinstance(value, list) else value for key, value in new.items()}
