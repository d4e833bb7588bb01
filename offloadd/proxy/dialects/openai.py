"""OpenAI's answers: a stream's chunks collected into the answer that a client which did not ask for a stream expects.

llama-server ends the work of a client that leaves only when the answer is a stream. So a plain request is sent on as a streaming
one, and its chunks are put together here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations")
"""Paths whose bodies may be forms, because files come with them."""
OTHERS = ("/v1/embeddings", "/v1/rerank", "/v1/responses/input_tokens", "/v1/audio/speech", "/v1/images/generations", *FORMS)
_PER_TOKEN = ("timings_per_token", "echo", "verbose")
_NOT_OF_A_WHOLE = frozenset({"choices", "usage", "timings", "object", "prompt_progress"})
"""Fields of a chunk that are its own, and not the answer's."""
_OBJECTS = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}
_MAX_CHOICES = 128


def can_collect(path: str, body: Mapping[str, Any]) -> bool:
    """Whether the plain answer can be rebuilt exactly from a stream of this request."""
    count = body.get("n")
    if path not in _OBJECTS or any(body.get(name) for name in _PER_TOKEN):
        return False
    if count is not None and not (isinstance(count, int) and 1 <= count <= _MAX_CHOICES):
        return False  # the engine is to say what is wrong with it
    return path == CHAT or isinstance(body.get("prompt"), str)


def as_stream(body: Mapping[str, Any]) -> Object:
    """The same request, streaming, with usage at the end."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


class Collector:
    """Puts the chunks of one stream together."""

    def __init__(self, path: str, choices: int = 1) -> None:
        self._chat = path == CHAT
        self._kind = _OBJECTS[path]
        self._head: Object = {}
        self._choices = {index: _Choice(index) for index in range(choices)}
        self._tail: Object = {}
        self.error: Object | None = None
        """The error object of an error event, if one came."""

    @property
    def complete(self) -> bool:
        """Whether the stream has said of every choice how it finished."""
        return all(choice.finish is not None for choice in self._choices.values())

    def add(self, chunk: Object) -> None:
        """Take one chunk in."""
        if "error" in chunk:
            self.error = chunk
            return
        self._head.update({key: value for key, value in chunk.items() if key not in _NOT_OF_A_WHOLE})
        if chunk.get("usage") is not None:
            self._tail["usage"] = add_usage(self._tail.get("usage"), chunk["usage"], each=len(self._choices) > 1)
        if chunk.get("timings") is not None:
            self._tail["timings"] = chunk["timings"]
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            self._choices.setdefault(index, _Choice(index)).add(choice)

    def answer(self) -> Object:
        """The whole answer, as if no stream had been asked for."""
        choices = [self._choices[index].answer(chat=self._chat) for index in sorted(self._choices)]
        return {**self._head, "object": self._kind, "choices": choices, **self._tail}


@dataclass(slots=True)
class _Choice:
    """One of the answers that are being made."""

    index: int
    finish: str | None = None
    stop_reason: Any = None
    text: list[str] = field(default_factory=list)
    message: Object = field(default_factory=lambda: {"role": "assistant"})
    texts: dict[str, list[str]] = field(default_factory=dict)
    calls: dict[int, Object] = field(default_factory=dict)
    logprobs: Object | None = None

    def add(self, choice: Object) -> None:
        self.finish = choice.get("finish_reason") or self.finish
        self.stop_reason = choice.get("stop_reason") or self.stop_reason
        if choice.get("text"):
            self.text.append(choice["text"])
        if choice.get("logprobs"):
            self.logprobs = _joined(self.logprobs or {}, choice["logprobs"])
        for key, value in (choice.get("delta") or {}).items():
            self._add_delta(key, value)

    def answer(self, *, chat: bool) -> Object:
        found: Object = {"index": self.index, "finish_reason": self.finish}
        found |= {"message": self._full_message()} if chat else {"text": "".join(self.text)}
        if self.stop_reason is not None:
            found["stop_reason"] = self.stop_reason
        return {**found, "logprobs": self.logprobs} if self.logprobs is not None or not chat else found

    def _add_delta(self, key: str, value: Any) -> None:
        if key == "tool_calls":
            for call in value or ():
                self._add_call(call)
        elif key == "role":
            self.message["role"] = value
        elif isinstance(value, str):
            self.texts.setdefault(key, []).append(value)
        elif value is not None:
            self.message[key] = value

    def _add_call(self, delta: Object) -> None:
        """A call's first delta names it, the others add to its arguments."""
        known = self.calls.setdefault(delta.get("index", len(self.calls)), {"function": {"arguments": ""}})
        function = delta.get("function") or {}
        known["function"]["arguments"] += function.get("arguments") or ""
        known["function"].update({key: value for key, value in function.items() if key != "arguments" and value is not None})
        known.update({key: value for key, value in delta.items() if key not in ("index", "function") and value is not None})

    def _full_message(self) -> Object:
        texts = {key: "".join(parts) for key, parts in self.texts.items()}
        content = texts.pop("content", "")
        message = {**self.message, "content": content, **texts}
        if self.calls:
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
            message["content"] = content or None
        return message


def add_usage(known: Object | None, usage: Object, *, each: bool) -> Object:
    """The counts so far with those of one more usage chunk; llama-server sends one for `each` choice, of that choice's tokens."""
    if not known or not each:
        return usage
    made = (known.get("completion_tokens") or 0) + (usage.get("completion_tokens") or 0)
    return {**usage, "completion_tokens": made, "total_tokens": made + (usage.get("prompt_tokens") or 0)}


def _joined(old: Object, new: Object) -> Object:
    """Log probabilities of more tokens behind those so far; lists grow, anything else is replaced."""
    return {key: [*old.get(key, ()), *value] if isinstance(value, list) else value for key, value in new.items()}
