"""Anthropic's answers: made from OpenAI's chunks, or tidied where an engine speaks Anthropic's dialect by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from offloadd.errors import RequestError
from offloadd.proxy.dialects.refusals import anthropic_body
from offloadd.proxy.dialects.turns import deltas, thought

Object = dict[str, Any]

_STOP_REASONS = {
    "stop": "end_turn",
    "eos_token": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
    "stop_sequence": "stop_sequence",
}


class Blocks:
    """Content blocks as they go out: one open at a time, each closed before the next begins."""

    def __init__(self) -> None:
        self.index = -1
        self.kind = ""

    def open(self, kind: str, block: Object) -> list[Object]:
        """Close what is open and begin a block."""
        closed = self.close()
        self.index += 1
        self.kind = kind
        return [*closed, {"type": "content_block_start", "index": self.index, "content_block": block}]

    def delta(self, delta: Object) -> Object:
        """More of the open block."""
        return {"type": "content_block_delta", "index": self.index, "delta": delta}

    def close(self) -> list[Object]:
        """End the open block, if there is one. A thought ends with its signature, which engines here do not make."""
        if not self.kind:
            return []
        signed = [self.delta({"type": "signature_delta", "signature": ""})] if self.kind == "thinking" else []
        self.kind = ""
        return [*signed, {"type": "content_block_stop", "index": self.index}]


@dataclass(slots=True)
class _Call:
    """One tool call while its pieces come in."""

    id: str = ""
    name: str = ""
    arguments: str = ""
    sent: int = 0
    """Characters of the arguments that have gone out."""

    @property
    def whole(self) -> bool:
        """Whether its arguments are complete JSON, so that nothing can follow."""
        try:
            msgspec.json.decode(self.arguments)
        except msgspec.DecodeError:
            return False
        return True


@dataclass(slots=True)
class ChatTurn:
    """Anthropic's events from OpenAI's chunks."""

    id: str
    model: str
    _blocks: Blocks = field(default_factory=Blocks)
    _begun: bool = False
    _calls: dict[int, _Call] = field(default_factory=dict)
    _live: int | None = None
    """The call whose block is open; others wait until it is whole."""
    _done: set[int] = field(default_factory=set)
    _finish: str = ""
    _stop_sequence: str | None = None
    _usage: Object = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether a finish reason came."""
        return bool(self._finish)

    def add(self, event: Object) -> list[Object]:
        """One chunk."""
        choice, delta = deltas(event)
        self._note(event, choice)
        out = self._begin()
        if found := thought(delta):
            out += self._piece("thinking", {"type": "thinking_delta", "thinking": found})
        if isinstance(text := delta.get("content"), str) and text:
            out += self._piece("text", {"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            self._take(call)
            out += self._flow()
        return out

    def finish(self) -> list[Object]:
        """Calls that still wait, then the end of the message."""
        out = [*self._begin(), *self._flow(force=True), *self._blocks.close()]
        reason = "stop_sequence" if self._stop_sequence else _STOP_REASONS.get(self._finish, "end_turn")
        stop = {"stop_reason": reason, "stop_sequence": self._stop_sequence}
        return [*out, {"type": "message_delta", "delta": stop, "usage": usage_of(self._usage)}, {"type": "message_stop"}]

    def refuse(self, error: RequestError) -> list[Object]:
        """An `error` event."""
        return [anthropic_body(error)]

    def _note(self, chunk: Object, choice: Object) -> None:
        self._usage = chunk.get("usage") or self._usage
        self._finish = choice.get("finish_reason") or self._finish
        if isinstance(choice.get("stop_reason"), str):  # vLLM names the sequence that matched
            self._stop_sequence = choice["stop_reason"]

    def _begin(self) -> list[Object]:
        if self._begun:
            return []
        self._begun = True
        empty: Object = {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 0, "output_tokens": 0}}
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [], **empty}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def _piece(self, kind: str, delta: Object) -> list[Object]:
        block = {"type": "thinking", "thinking": "", "signature": ""} if kind == "thinking" else {"type": "text", "text": ""}
        opened = [] if self._blocks.kind == kind else self._blocks.open(kind, block)
        return [*opened, self._blocks.delta(delta)]

    def _take(self, delta: Object) -> None:
        call = self._calls.setdefault(delta.get("index", len(self._calls)), _Call())
        function = delta.get("function") or {}
        call.id = delta.get("id") or call.id
        call.name = function.get("name") or call.name
        call.arguments += function.get("arguments") or ""

    def _flow(self, *, force: bool = False) -> list[Object]:
        """Send what can be sent: the live call's pieces, then the next call once that one is whole, or all when forced."""
        out: list[Object] = []
        for number in sorted(self._calls):
            call = self._calls[number]
            if number in self._done:
                continue
            if self._live != number:
                self._live = number
                block = {"type": "tool_use", "id": call.id or f"toolu_{number}", "name": call.name, "input": {}}
                out += self._blocks.open("tool_use", block)
            if call.sent < len(call.arguments):
                out.append(self._blocks.delta({"type": "input_json_delta", "partial_json": call.arguments[call.sent :]}))
                call.sent = len(call.arguments)
            last = number == max(self._calls)
            if not force and (last or not call.whole):
                return out
            self._done.add(number)
        return out


def usage_of(usage: Object) -> Object:
    """Anthropic counts what came from a cache apart from the rest of the prompt."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt, made = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    found = {"input_tokens": max(0, prompt - cached), "output_tokens": made}
    return {**found, "cache_read_input_tokens": cached} if cached else found


@dataclass(slots=True)
class NativeTurn:
    """The events of an engine that speaks Anthropic's dialect, put right.

    llama-server closes a block only at the very end, when others have begun, says `end_turn` where a stop sequence ended it, and
    leaves out a tool call's empty input; ids and names are its own.
    """

    id: str
    model: str
    _blocks: Blocks = field(default_factory=Blocks)
    _numbers: dict[int, int] = field(default_factory=dict)
    """The index under which a block of the engine's went out."""
    _stopped: bool = False

    @property
    def complete(self) -> bool:
        """Whether the message was ended."""
        return self._stopped

    def add(self, event: Object) -> list[Object]:
        """One event."""
        match event.get("type"):
            case "message_start":
                ours = {"id": self.id, "model": self.model}
                return [{**event, "message": {"stop_reason": None, "stop_sequence": None, **event.get("message", {}), **ours}}]
            case "content_block_start":
                return self._start(event)
            case "content_block_delta":
                return self._delta(event)
            case "content_block_stop":
                return self._blocks.close() if self._numbers.get(event.get("index", -1)) == self._blocks.index else []
            case "message_delta":
                return [*self._blocks.close(), _told_stop(event)]
            case "message_stop":
                self._stopped = True
                return [*self._blocks.close(), event]
            case _:
                return [event]

    def finish(self) -> list[Object]:
        """The engine has said it all."""
        return []

    def refuse(self, error: RequestError) -> list[Object]:
        """An `error` event."""
        return [anthropic_body(error)]

    def _start(self, event: Object) -> list[Object]:
        block = event.get("content_block") or {}
        kind = str(block.get("type", ""))
        missing: Object = {"tool_use": {"input": {}}, "thinking": {"signature": ""}}
        filled: Object = missing.get(kind, {})
        out = self._blocks.open(kind, {**filled, **block})
        self._numbers[event.get("index", self._blocks.index)] = self._blocks.index
        return out

    def _delta(self, event: Object) -> list[Object]:
        """Of the open block only: a signature comes when a thought has long been closed, and was sent then."""
        delta = event.get("delta") or {}
        if self._numbers.get(event.get("index", -1)) != self._blocks.index or delta.get("type") == "signature_delta":
            return []
        return [self._blocks.delta(delta)]


def _told_stop(event: Object) -> Object:
    delta = event.get("delta") or {}
    if delta.get("stop_sequence"):
        delta = {**delta, "stop_reason": "stop_sequence"}
    return {**event, "delta": {"stop_sequence": None, **delta}}


class MessageMerge:
    """The whole message from its events."""

    def __init__(self) -> None:
        self._message: Object = {}
        self._blocks: list[Object] = []
        self._json: dict[int, list[str]] = {}

    def add(self, event: Object) -> None:
        """Take one event in."""
        match event["type"]:
            case "message_start":
                self._message = {**event["message"]}
            case "content_block_start":
                self._blocks.append({**event["content_block"]})
            case "content_block_delta":
                self._add_delta(event["index"], event["delta"])
            case "message_delta":
                self._message |= event["delta"]
                self._message["usage"] = {**self._message.get("usage", {}), **(event.get("usage") or {})}

    def answer(self) -> Object:
        """The message."""
        for index, pieces in self._json.items():
            self._blocks[index]["input"] = _parsed("".join(pieces))
        return {**self._message, "content": self._blocks}

    def _add_delta(self, index: int, delta: Object) -> None:
        block = self._blocks[index]
        match delta.get("type"):
            case "text_delta":
                block["text"] += delta["text"]
            case "thinking_delta":
                block["thinking"] += delta["thinking"]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "input_json_delta":
                self._json.setdefault(index, []).append(delta["partial_json"])


def _parsed(text: str) -> Object:
    """A tool's input. One that was cut off by `max_tokens`, or that is no object, is kept as the text that it is."""
    try:
        found = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        found = None
    return found if isinstance(found, dict) else {"partial_json": text}
