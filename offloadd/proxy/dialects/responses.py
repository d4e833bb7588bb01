"""OpenAI's responses of engines that make them: with the numbers, names and endings that OpenAI's clients count on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offloadd.errors import RequestError
from offloadd.proxy.dialects.refusals import engine_error

Object = dict[str, Any]

RESPONSES = "/v1/responses"
_ENDS = {"response.completed", "response.incomplete", "response.failed"}
_TOLD_BACK = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "temperature",
    "text",
    "top_p",
    "tools",
    "tool_choice",
)


@dataclass(slots=True)
class ResponsesTurn:
    """One response, event by event. llama-server numbers nothing, and says `completed` of what it cut off; so does vLLM."""

    model: str
    asked: Object
    _number: int = -1
    _items: dict[str, int] = field(default_factory=dict)
    """Place of each output item, by its id."""
    _parts: dict[str, int] = field(default_factory=dict)
    """The part of each item that is being written."""
    _done: bool = False

    @property
    def complete(self) -> bool:
        """Whether the response has ended, well or badly."""
        return self._done

    def add(self, event: Object) -> list[Object]:
        """One event."""
        self._number += 1
        kind = str(event.get("type", ""))
        placed = {**event, **self._place(kind, event), "sequence_number": self._number}
        if "response" not in event:
            return [placed]
        response = self._response(event["response"], ended=kind in _ENDS)
        if kind in _ENDS:
            self._done = True
            placed["type"] = f"response.{response['status']}"
        return [{**placed, "response": response}]

    def finish(self) -> list[Object]:
        """The engine has said it all."""
        return []

    def refuse(self, error: RequestError) -> list[Object]:
        """An `error` event."""
        self._number += 1
        return [error_event(error, self._number)]

    def _place(self, kind: str, event: Object) -> Object:
        """Which item, and which part of it, an event is about."""
        item = str((event.get("item") or {}).get("id") or event.get("item_id") or "")
        if not item:
            return {}
        index = self._items.setdefault(item, event.get("output_index", len(self._items)))
        place: Object = {"output_index": index}
        if kind == "response.content_part.added":
            self._parts[item] = event.get("content_index", self._parts.get(item, -1) + 1)
        if "content_part" in kind or "text" in kind:
            place["content_index"] = event.get("content_index", self._parts.get(item, 0))
        if "output_text" in kind:
            place["logprobs"] = event.get("logprobs") or []
        return place

    def _response(self, response: Object, *, ended: bool) -> Object:
        found = {**told_back(self.asked), **response, "model": self.model}
        if ended and found.get("status") in (None, "completed") and (found["incomplete_details"] or self._cut(found)):
            details = found["incomplete_details"] or {"reason": "max_output_tokens"}
            return {**found, "status": "incomplete", "incomplete_details": details}
        return {**found, "status": found.get("status") or ("completed" if ended else "in_progress")}

    def _cut(self, response: Object) -> bool:
        """Whether it has as many tokens as it may have."""
        limit, made = self.asked.get("max_output_tokens"), (response.get("usage") or {}).get("output_tokens")
        return isinstance(limit, int) and isinstance(made, int) and made >= limit


def told_back(asked: Object) -> Object:
    """The fields of a response that say what was asked for, and those that stay empty."""
    usual: Object = {"parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "output": [], "error": None}
    usual |= {"incomplete_details": None, "instructions": None, "metadata": {}, "object": "response", "store": False}
    return usual | {name: asked[name] for name in _TOLD_BACK if asked.get(name) is not None}


def error_event(error: RequestError, number: int) -> Object:
    """An error within a stream."""
    return {"type": "error", "code": error.code, "message": error.message, "param": error.param, "sequence_number": number}


class ResponseMerge:
    """The whole response: the one that its last event carries."""

    def __init__(self) -> None:
        self._response: Object = {}

    def add(self, event: Object) -> None:
        """Take one event in."""
        self._response = event.get("response", self._response)

    def answer(self) -> Object:
        """The response; RequestError when it failed."""
        if self._response.get("status") == "failed":
            error = self._response.get("error") or {}
            raise engine_error(500, str(error.get("message", "")).encode())
        return self._response
