"""Ollama's answers, made from OpenAI's chunks: one JSON object a line, the last one with the counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from offloadd.errors import RequestError
from offloadd.proxy.dialects.refusals import ollama_body
from offloadd.proxy.dialects.turns import deltas, thought

Object = dict[str, Any]

_NS = 1_000_000_000
_DONE_REASONS = {"length": "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a translation cannot know by itself: the date, and how long things took. Asked anew for each event."""

    created: Callable[[], str]
    """The date now, as RFC 3339 writes it."""
    spent: Callable[[], float]
    """Seconds since the request came."""
    loading: float = 0.0
    """Seconds until it was granted an instance."""


@dataclass(slots=True)
class OllamaTurn:
    """Ollama's lines from OpenAI's chunks, of a chat or of a text completion."""

    model: str
    times: Times
    chat: bool = True
    """Whether the text comes as a `message`, or as a `response`."""
    _calls: dict[int, Object] = field(default_factory=dict)
    _finish: str = ""
    _usage: Object = field(default_factory=dict)
    _timings: Object = field(default_factory=dict)
    _first: float | None = None

    @property
    def complete(self) -> bool:
        """Whether a finish reason came."""
        return bool(self._finish)

    def add(self, event: Object) -> list[Object]:
        """One chunk. A call is told when it is whole: its arguments are an object here."""
        choice, delta = deltas(event)
        self._usage = event.get("usage") or self._usage
        self._timings = event.get("timings") or self._timings
        self._finish = choice.get("finish_reason") or self._finish
        for call in delta.get("tool_calls") or ():
            self._take(call)
        text, thinking = delta.get("content") or choice.get("text") or "", thought(delta)
        if not text and not thinking:
            return []
        if self._first is None:
            self._first = self.times.spent()
        return [self._line(text, thinking)]

    def finish(self) -> list[Object]:
        """The calls, and the line that ends the answer."""
        calls = [_call(self._calls[index]) for index in sorted(self._calls)]
        told = [self._line("", "", calls)] if calls else []
        return [
            *told,
            {**self._line("", ""), "done": True, "done_reason": _DONE_REASONS.get(self._finish, "stop"), **self._counts()},
        ]

    def refuse(self, error: RequestError) -> list[Object]:
        """A line with the error."""
        return [ollama_body(error)]

    def _line(self, text: str, thinking: str, calls: list[Object] | None = None) -> Object:
        head = {"model": self.model, "created_at": self.times.created()}
        thoughts = {"thinking": thinking} if thinking else {}
        if not self.chat:
            return {**head, "response": text, **thoughts, "done": False}
        message = {"role": "assistant", "content": text, **thoughts, **({"tool_calls": calls} if calls else {})}
        return {**head, "message": message, "done": False}

    def _take(self, delta: Object) -> None:
        call = self._calls.setdefault(delta.get("index", len(self._calls)), {"name": "", "arguments": ""})
        function = delta.get("function") or {}
        call["id"] = delta.get("id") or call.get("id")
        call["name"] = function.get("name") or call["name"]
        call["arguments"] += function.get("arguments") or ""

    def _counts(self) -> Object:
        """Durations in nanoseconds: the engine's own where it tells them, else by the clock."""
        spent = self.times.spent()
        first = spent if self._first is None else self._first
        reading, making = self._timings.get("prompt_ms"), self._timings.get("predicted_ms")
        read = first - self.times.loading if reading is None else reading / 1000
        made = spent - first if making is None else making / 1000
        return {
            "total_duration": _ns(spent),
            "load_duration": _ns(self.times.loading),
            "prompt_eval_count": self._usage.get("prompt_tokens") or 0,
            "prompt_eval_duration": _ns(read),
            "eval_count": self._usage.get("completion_tokens") or 0,
            "eval_duration": _ns(made),
        }


class LineMerge:
    """The whole answer from its lines: the last one, with all the text."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Object] = []
        self._last: Object = {}

    def add(self, event: Object) -> None:
        """Take one line in."""
        said = event.get("message", event)
        self._text.append(said.get("content") or said.get("response") or "")
        self._thoughts.append(said.get("thinking") or "")
        self._calls += said.get("tool_calls") or []
        self._last = event

    def answer(self) -> Object:
        """One line for all."""
        text, thoughts = "".join(self._text), "".join(self._thoughts)
        thinking = {"thinking": thoughts} if thoughts else {}
        if "message" not in self._last:
            return {**self._last, "response": text, **thinking}
        calls = {"tool_calls": self._calls} if self._calls else {}
        return {**self._last, "message": {**self._last["message"], "content": text, **thinking, **calls}}


def loaded(model: str, times: Times, *, chat: bool, unloaded: bool = False) -> Object:
    """The answer to a request without a prompt, which only loads the model, or unloads it."""
    said: Object = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    reason = "unload" if unloaded else "load"
    return {"model": model, "created_at": times.created(), **said, "done": True, "done_reason": reason}


def embedded(answer: Object, model: str, times: Times) -> Object:
    """`/api/embed` from OpenAI's embeddings, in the order of the inputs."""
    vectors = [entry["embedding"] for entry in sorted(answer.get("data") or (), key=lambda entry: entry.get("index", 0))]
    counted = (answer.get("usage") or {}).get("prompt_tokens") or 0
    spans = {"total_duration": _ns(times.spent()), "load_duration": _ns(times.loading)}
    return {"model": model, "embeddings": vectors, **spans, "prompt_eval_count": counted}


def _call(call: Object) -> Object:
    try:
        arguments = msgspec.json.decode(call["arguments"] or "{}")
    except msgspec.DecodeError:
        arguments = {"partial_json": call["arguments"]}  # cut off by num_predict
    named = {"id": call["id"]} if call.get("id") else {}
    return {**named, "function": {"name": call["name"], "arguments": arguments if isinstance(arguments, dict) else {}}}


def _ns(seconds: float) -> int:
    return max(0, round(seconds * _NS))
