"""OpenAI's streams from engines that do not quite speak it: put right chunk by chunk. Those that do go by untouched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse, turns
from offloadd.proxy.dialects.base import Change
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS, add_usage
from offloadd.state.launch import EngineApi

Object = dict[str, Any]

_FINISHES = {"eos_token": "stop", "stop_sequence": "stop"}
_KINDS = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}


def repair(path: str, api: EngineApi, choices: int | None, model: str, number: str) -> Change | None:
    """What has to be done to this answer on its way; None when it may go as it is."""
    if path not in _KINDS or (api.exact and (choices or 1) <= 1):
        return None
    turn = RepairTurn(model=model, id=number, choices=choices or 1, renamed=not api.exact)
    return turns.TurnStream(turn, turns.as_events, "text/event-stream", closing=sse.DONE)


@dataclass(slots=True)
class RepairTurn:
    """OpenAI's chunks as OpenAI sends them: one id and one name throughout, its finish reasons, and one usage at the end."""

    model: str
    id: str
    choices: int = 1
    renamed: bool = True
    """Whether ids, names and reasons may be the engine's own."""
    _finished: set[int] = field(default_factory=set)
    _usage: Object | None = None

    @property
    def complete(self) -> bool:
        """Whether every choice has a finish reason."""
        return len(self._finished) >= self.choices

    def add(self, event: Object) -> list[Object]:
        """One chunk; one that brings only the counts is kept for the end."""
        if event.get("usage") is not None and not event.get("choices"):
            usage = add_usage((self._usage or {}).get("usage"), event["usage"], each=self.choices > 1)
            self._usage = {**self._named(event), "usage": usage}
            return []
        choices = [self._choice(choice) for choice in event.get("choices") or ()]
        return [{**self._named(event), "choices": choices}]

    def finish(self) -> list[Object]:
        """The counts, if there were any."""
        return [self._usage] if self._usage else []

    def refuse(self, error: RequestError) -> list[Object]:
        """An event with OpenAI's error object."""
        return [error.body]

    def _named(self, event: Object) -> Object:
        return {**event, "model": self.model, "id": event.get("id") or self.id} if self.renamed else event

    def _choice(self, choice: Object) -> Object:
        reason = choice.get("finish_reason")
        if not reason:
            return {**choice, "finish_reason": None}  # TGI says "" of a text that goes on
        self._finished.add(choice.get("index", 0))
        return {**choice, "finish_reason": _FINISHES.get(reason, reason)}


def put_right(path: str, answer: Object, model: str, number: str) -> Object:
    """The same for an answer that came whole."""
    if path not in _KINDS:
        return {**answer, "model": model} if "model" in answer else answer
    choices = [
        {**choice, "finish_reason": _FINISHES.get(choice.get("finish_reason"), choice.get("finish_reason"))}
        for choice in answer.get("choices") or ()
    ]
    return {**answer, "id": answer.get("id") or number, "object": _KINDS[path], "model": model, "choices": choices}
