"""What an engine of one's own speaks, where that is JSON of its own: where things stand in its requests and in its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Pointer = tuple[str, ...]
"""Keys and places on the way to a value, outermost first; empty for the whole document."""


class Framing(StrEnum):
    """How the events of a stream are told apart."""

    SSE = "sse"
    """Server-sent events: `data:` lines."""
    NDJSON = "ndjson"
    """One JSON value a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A conversation as one text: `${text}` in each stands for what was said, and `open` is where the answer begins."""

    system: str
    user: str
    assistant: str
    open: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """A conversation as a list of messages, as the engine spells one."""

    at: Pointer
    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    """Its own words for `system`, `user` and `assistant`, where it has others."""
    system: Pointer | None = None
    """Where the system's text goes, when that is no message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where things stand in an answer, or in one event of a stream. What is None is not told."""

    text: Pointer
    finish_reason: Pointer | None = None
    prompt_tokens: Pointer | None = None
    completion_tokens: Pointer | None = None
    error: Pointer | None = None
    """Says what went wrong, when there is something there but null, false and empty text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed(Answer):
    """The same of the events of a stream."""

    framing: Framing
    path: str = ""
    """Where streams are asked for, if not where whole answers are."""
    switch: Pointer | None = None
    """Set to true in a request for a stream, and to false in one for a whole answer."""
    grows: bool = False
    """Whether each event has all the text so far, rather than what is new."""
    done: Pointer | None = None
    """There is true, or anything but null, false, 0 and empty text, in the last event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One engine's own JSON. It has `prompt` or `messages` or both, and `answer` or `stream` or both."""

    path: str
    """Where requests are posted."""
    prompt: Pointer | None = None
    turns: Turns | None = None
    """Makes a prompt of a conversation, for an engine without `messages`."""
    messages: Messages | None = None
    model: Pointer | None = None
    parameters: Mapping[str, Pointer] = field(default_factory=dict)
    """By OpenAI's names; what is not among them is not sent."""
    body: Mapping[str, object] = field(default_factory=dict)
    """What every request has, before anything is put into it."""
    answer: Answer | None = None
    stream: Streamed | None = None
    finish_reasons: Mapping[str, str] = field(default_factory=dict)
    """OpenAI's word for each of the engine's that is not one of OpenAI's."""

    @property
    def chats(self) -> bool:
        """Whether conversations can be told."""
        return self.messages is not None or self.turns is not None

    def streams(self, *, wanted: bool) -> bool:
        """Whether the engine is asked for a stream, for a client that wants one or not."""
        return self.stream is not None and (wanted or self.answer is None)
