"""OpenAI's responses made from the chunks of its chat completions, for engines that have only those."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offloadd.errors import RequestError
from offloadd.proxy.dialects.responses import error_event, told_back
from offloadd.proxy.dialects.turns import deltas, thought

Object = dict[str, Any]

_WORDS = {"output_text": "text", "refusal": "refusal", "reasoning_text": "text"}
"""Kinds of parts, and the field that their text is in."""
_EVENTS = {"output_text": "response.output_text", "refusal": "response.refusal", "reasoning_text": "response.reasoning_text"}
_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Finish reasons of an answer that is not whole, as `incomplete_details` says them."""


@dataclass(slots=True)
class _Part:
    """A text that is being written."""

    kind: str
    text: list[str] = field(default_factory=list)
    logprobs: list[Object] = field(default_factory=list)

    def shown(self) -> Object:
        """The part as it is now."""
        found: Object = {"type": self.kind, _WORDS[self.kind]: "".join(self.text)}
        return {**found, "annotations": [], "logprobs": self.logprobs} if self.kind == "output_text" else found


@dataclass(slots=True)
class _Item:
    """One item of the output. A function call may be written piece by piece while others are."""

    id: str
    kind: str
    index: int
    parts: list[_Part] = field(default_factory=list)
    call_id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    status: str = "in_progress"

    def shown(self) -> Object:
        """The item as it is now."""
        found: Object = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**found, "call_id": self.call_id, "name": self.name, "arguments": "".join(self.arguments)}
        content = [part.shown() for part in self.parts]
        if self.kind == "reasoning":
            return {**found, "summary": [], "content": content}
        return {**found, "role": "assistant", "content": content}


@dataclass(slots=True)
class _Call:
    """A call of the engine's that has no name yet, so that no item can begin."""

    id: str = ""
    waiting: list[str] = field(default_factory=list)
    item: _Item | None = None


@dataclass(slots=True)
class ChatResponseTurn:
    """The events of a response from OpenAI's chunks. `asked` is the client's request, `number` marks all ids of the answer."""

    number: str
    model: str
    created: int
    """In seconds since 1970."""
    asked: Object
    _count: int = -1
    _items: list[_Item] = field(default_factory=list)
    _open: _Item | None = None
    """The message or thought that is being written: one at a time."""
    _calls: dict[int, _Call] = field(default_factory=dict)
    _finish: str = ""
    _usage: Object | None = None

    @property
    def complete(self) -> bool:
        """Whether a finish reason came."""
        return bool(self._finish)

    def add(self, event: Object) -> list[Object]:
        """One chunk."""
        choice, delta = deltas(event)
        self._usage = event.get("usage") or self._usage
        self._finish = choice.get("finish_reason") or self._finish
        out = self._begin()
        if found := thought(delta):
            out += self._write("reasoning", "reasoning_text", found)
        if isinstance(text := delta.get("content"), str) and text:
            out += self._write("message", "output_text", text, (choice.get("logprobs") or {}).get("content") or [])
        if isinstance(text := delta.get("refusal"), str) and text:
            out += self._write("message", "refusal", text)
        for call in delta.get("tool_calls") or ():
            out += self._call(call)
        return out

    def finish(self) -> list[Object]:
        """Close every item, and the response."""
        cut = _CUT.get(self._finish)
        status = "incomplete" if cut else "completed"
        out = self._begin()
        for call in self._calls.values():
            out += self._begin_call(call) if call.item is None else []
        out += self._close(status)
        for call in self._calls.values():
            out += self._close_call(call.item, status) if call.item else []
        response = self._response(status)
        response |= {"incomplete_details": {"reason": cut}} if cut else {}
        return [*out, self._say(f"response.{status}", response=response)]

    def refuse(self, error: RequestError) -> list[Object]:
        """An `error` event."""
        self._count += 1
        return [error_event(error, self._count)]

    def _begin(self) -> list[Object]:
        if self._count >= 0:
            return []
        return [self._say(f"response.{kind}", response=self._response("in_progress")) for kind in ("created", "in_progress")]

    def _say(self, kind: str, **more: Any) -> Object:
        self._count += 1
        return {"type": kind, "sequence_number": self._count, **more}

    def _response(self, status: str) -> Object:
        found = {"id": f"resp_{self.number}", "object": "response", "created_at": self.created, "status": status}
        output = [item.shown() for item in self._items] if status != "in_progress" else []
        usage = None if status == "in_progress" or self._usage is None else usage_of(self._usage)
        return {**told_back(self.asked), **found, "model": self.model, "output": output, "usage": usage}

    def _new(self, kind: str, prefix: str, **more: Any) -> _Item:
        index = len(self._items)
        item = _Item(f"{prefix}_{self.number}_{index}", kind, index, **more)
        self._items.append(item)
        return item

    def _added(self, item: _Item) -> Object:
        return self._say("response.output_item.added", output_index=item.index, item=item.shown())

    def _write(self, kind: str, part: str, text: str, logprobs: list[Object] | None = None) -> list[Object]:
        """More of a message or a thought; a new one begins where another was open."""
        out: list[Object] = []
        item = self._open
        if item is None or item.kind != kind:
            out += self._close("completed")
            item = self._open = self._new(kind, "rs" if kind == "reasoning" else "msg")
            out.append(self._added(item))
        if not item.parts or item.parts[-1].kind != part:
            out += self._close_part(item)
            item.parts.append(_Part(part))
            out.append(self._say("response.content_part.added", **self._place(item), part=item.parts[-1].shown()))
        item.parts[-1].text.append(text)
        item.parts[-1].logprobs += logprobs or []
        more = {"logprobs": logprobs or []} if part == "output_text" else {}
        return [*out, self._say(f"{_EVENTS[part]}.delta", **self._place(item), delta=text, **more)]

    def _place(self, item: _Item) -> Object:
        return {"item_id": item.id, "output_index": item.index, "content_index": len(item.parts) - 1}

    def _close_part(self, item: _Item) -> list[Object]:
        if not item.parts:
            return []
        part = item.parts[-1]
        word, shown = _WORDS[part.kind], part.shown()
        more = {"logprobs": part.logprobs} if part.kind == "output_text" else {}
        return [
            self._say(f"{_EVENTS[part.kind]}.done", **self._place(item), **{word: shown[word]}, **more),
            self._say("response.content_part.done", **self._place(item), part=shown),
        ]

    def _close(self, status: str) -> list[Object]:
        item, self._open = self._open, None
        if item is None:
            return []
        out = self._close_part(item)
        item.status = status
        return [*out, self._say("response.output_item.done", output_index=item.index, item=item.shown())]

    def _call(self, delta: Object) -> list[Object]:
        call = self._calls.setdefault(delta.get("index", len(self._calls)), _Call())
        function = delta.get("function") or {}
        piece = function.get("arguments") or ""
        call.id = delta.get("id") or call.id
        if call.item is not None:
            return self._arguments(call.item, piece)
        call.waiting.append(piece)
        return self._begin_call(call, function["name"]) if function.get("name") else []

    def _begin_call(self, call: _Call, name: str = "") -> list[Object]:
        out = self._close("completed")
        item = self._new("function_call", "fc", name=name)
        item.call_id = call.id or f"call_{self.number}_{item.index}"
        call.item = item
        return [*out, self._added(item), *self._arguments(item, "".join(call.waiting))]

    def _arguments(self, item: _Item, piece: str) -> list[Object]:
        if not piece:
            return []
        item.arguments.append(piece)
        return [self._say("response.function_call_arguments.delta", item_id=item.id, output_index=item.index, delta=piece)]

    def _close_call(self, item: _Item, status: str) -> list[Object]:
        item.status = status
        shown = item.shown()
        told = {"item_id": item.id, "output_index": item.index, "name": item.name, "arguments": shown["arguments"]}
        return [
            self._say("response.function_call_arguments.done", **told),
            self._say("response.output_item.done", output_index=item.index, item=shown),
        ]


def usage_of(usage: Object) -> Object:
    """A chat's counts under a response's names."""
    prompt, made = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thoughts = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": prompt + made,
    }
