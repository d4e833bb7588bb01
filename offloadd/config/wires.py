"""`inference.format` where an engine speaks JSON of its own: the section, its checks, and the `Wire` that it becomes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, PlainSerializer, Strict, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from offloadd.backends.pointers import put, written
from offloadd.config import fields
from offloadd.config.fields import expected, refused
from offloadd.config.section import Section
from offloadd.state.wire import Answer, Framing, Messages, Pointer, Streamed, Turns, Wire

_MAX_BODY = 16 * 1024
_TEXT = "${text}"
_NO_PARAMETERS = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "backend", "max_completion_tokens"}
    | {"tools", "tool_choice", "functions", "function_call", "modalities", "audio"}
    | {"n", "best_of", "logprobs", "top_logprobs", "echo", "suffix"}
)
"""What has a key of its own here, and what no answer could show."""


class TurnsSection(Section):
    """How a conversation becomes one text. `${text}` stands for what was said."""

    system: fields.Text
    """What a system message becomes, such as `"<|system|>${text}\\n"`."""
    user: fields.Text
    """What a user's message becomes."""
    assistant: fields.Text
    """What an earlier answer becomes."""
    open: fields.Text = ""
    """Comes last: where the answer begins."""

    @model_validator(mode="after")
    def _all_have_text(self) -> Self:
        for name in ("system", "user", "assistant"):
            if _TEXT not in getattr(self, name):
                raise refused(f"{_TEXT} is missing, which stands for what was said", at=name)
        return self


class RoleWords(Section):
    """The engine's words for roles."""

    system: fields.Text = "system"
    """The system's."""
    user: fields.Text = "user"
    """The user's."""
    assistant: fields.Text = "assistant"
    """The model's own."""


class MessagesSection(Section):
    """Where a conversation goes, as a list of objects."""

    at: fields.Place
    """Where the list goes."""
    role: Annotated[str, Field(min_length=1, max_length=256)] = "role"
    """The key of a message that says whose it is."""
    content: Annotated[str, Field(min_length=1, max_length=256)] = "content"
    """The key of its text."""
    roles: RoleWords = RoleWords()
    """The engine's words for roles."""
    system: fields.Place | None = None
    """Where the system's text goes, for engines that want it apart from the list."""

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        if self.role == self.content:
            raise refused("role and content cannot be one key", at="content")
        return self


class AnswerSection(Section):
    """Where things stand in an answer."""

    text: fields.JsonPointer
    """The text; nothing but text may stand there."""
    finish_reason: fields.JsonPointer | None = None
    """Why it ended, in OpenAI's words or in those of `finish_reasons`. Without, every answer ends with `stop`."""
    prompt_tokens: fields.JsonPointer | None = None
    """How many tokens the prompt has; told to clients together with `completion_tokens`."""
    completion_tokens: fields.JsonPointer | None = None
    """How many tokens the answer has."""
    error: fields.JsonPointer | None = None
    """What went wrong: whatever is there but `null`, `false` and empty text. Looked for in refusals too."""

    @model_validator(mode="after")
    def _both_counts(self) -> Self:
        if (self.prompt_tokens is None) != (self.completion_tokens is None):
            given = "completion_tokens" if self.prompt_tokens is None else "prompt_tokens"
            raise refused("is told to clients only together with the other count", at=given)
        return self


class StreamSection(AnswerSection):
    """How streams are asked for, and where things stand in each of their events."""

    framing: Annotated[Framing, Strict(False)]
    """`sse`: server-sent events with JSON in their `data:` lines. `ndjson`: one JSON value a line."""
    path: fields.UrlPath | None = None
    """Where streams are asked for, if not where whole answers are."""
    switch: fields.Place | None = None
    """Set to `true` in a request for a stream, to `false` in others."""
    grows: bool = False
    """Whether each event has all the text so far, rather than what is new."""
    done: fields.JsonPointer | None = None
    """There is `true` in the last event. With neither this nor `finish_reason` a stream that was cut is not noticed."""


class FormatSection(Section):
    """JSON of an engine's own: where things go in a request, and where they stand in an answer. Places are JSON pointers."""

    prompt: fields.Place | None = None
    """Where a text goes that is to be continued."""
    turns: TurnsSection | None = None
    """How a conversation becomes such a text, for an engine that knows no messages."""
    messages: MessagesSection | None = None
    """Where a conversation goes."""
    model: fields.Place | None = None
    """Where the model's name goes, if it is wanted."""
    parameters: Annotated[dict[str, fields.Place], Field(max_length=64)] = Field(default_factory=dict)
    """Where OpenAI's parameters go, such as `{max_tokens: /options/limit}`. What is not here is not sent; a request with `stop` or
    `response_format` is then refused."""
    body: Annotated[dict[str, Any], Field(max_length=256)] = Field(default_factory=dict)
    """What every request has besides; any JSON. Lists that a place leads through must be here."""
    answer: AnswerSection | None = None
    """A whole answer. Without, every request is made as a stream, and put together here."""
    stream: StreamSection | None = None
    """Streams. Without, a client that wants one gets the whole answer as one piece."""
    finish_reasons: Annotated[dict[str, Literal["stop", "length", "content_filter"]], Field(max_length=64)] = Field(
        default_factory=dict
    )
    """OpenAI's word for each of the engine's. One that is neither here nor OpenAI's means `stop`."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise refused("needs prompt or messages: where what is asked goes")
        if self.turns is not None and self.messages is not None:
            raise refused("has no use beside messages", at="turns")
        if self.turns is not None and self.prompt is None:
            raise refused("needs prompt: where the text that it makes goes", at="turns")
        for name in self.parameters:
            if name in _NO_PARAMETERS:
                raise refused(
                    f'"{name}" cannot be a parameter: it has a key of its own, or no answer could show it', at="parameters"
                )
        return self

    @model_validator(mode="after")
    def _can_answer(self) -> Self:
        if self.answer is None and self.stream is None:
            raise refused("needs answer or stream: where the text stands in what comes back")
        if self.answer is not None and self.stream is not None and self.stream.switch is None and self.stream.path is None:
            raise refused("needs switch or path: how a stream is asked for rather than a whole answer", at="stream")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            size = len(json.dumps(self.body))
        except (ValueError, RecursionError):
            raise refused("is not JSON", at="body") from None
        if size > _MAX_BODY:
            raise refused(f"must be at most {_MAX_BODY:,} bytes of JSON", at="body")
        for kind in ("prompt", "messages"):
            if getattr(self, kind) is not None:
                self._place_all(kind)
        return self

    def _place_all(self, kind: str) -> None:
        """Put something at each place that a request of this kind has, as the translation will."""
        body = copy.deepcopy(self.body)
        taken: dict[Pointer, str] = {}
        for name, place in self._places(kind):
            for other, by in taken.items():
                if place[: len(other)] == other or other[: len(place)] == place:
                    raise refused(f'{written(place)} is also where "{by}" goes, or within it', at=name.split(".", maxsplit=1)[0])
            taken[place] = name
            try:
                put(body, place, None)
            except ValueError as problem:
                raise refused(f"nothing can be put at {written(place)}: {problem}", at=name.split(".", maxsplit=1)[0]) from None

    def _places(self, kind: str) -> Iterator[tuple[str, Pointer]]:
        if kind == "prompt" and self.prompt is not None:
            yield "prompt", self.prompt
        if kind == "messages" and self.messages is not None:
            yield "messages", self.messages.at
            if self.messages.system is not None:
                yield "messages.system", self.messages.system
        if self.model is not None:
            yield "model", self.model
        for name, place in self.parameters.items():
            yield f"parameters.{name}", place
        if self.stream is not None and self.stream.switch is not None:
            yield "stream.switch", self.stream.switch


class _OrOpenAi:
    """In the published schema, nothing to declare is written `openai`."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Pydantic's hook."""
        made = handler(schema)
        return {**made, "anyOf": [{"const": "openai"}, *(each for each in made["anyOf"] if each != {"type": "null"})]}


def _or_openai(value: object) -> object:
    if value == "openai":
        return None
    if not isinstance(value, dict):
        raise expected("openai, or a mapping that says where things stand in its JSON")
    return value


Format = Annotated[
    FormatSection | None,
    BeforeValidator(_or_openai),
    PlainSerializer(lambda value: value or "openai"),
    _OrOpenAi(),
]
"""`openai`, which is None, or the section."""


def to_wire(path: str, section: FormatSection) -> Wire:
    """What an engine whose requests go to `path` speaks."""
    turns, answer, stream = section.turns, section.answer, section.stream
    return Wire(
        path=path,
        prompt=section.prompt,
        turns=None if turns is None else Turns(system=turns.system, user=turns.user, assistant=turns.assistant, open=turns.open),
        messages=None if section.messages is None else _messages(section.messages),
        model=section.model,
        parameters=section.parameters,
        body=section.body,
        answer=None if answer is None else Answer(**_shape(answer)),
        stream=None if stream is None else _streamed(stream),
        finish_reasons=section.finish_reasons,
    )


def _messages(section: MessagesSection) -> Messages:
    roles = section.roles.model_dump()
    return Messages(at=section.at, role=section.role, content=section.content, roles=roles, system=section.system)


def _streamed(section: StreamSection) -> Streamed:
    return Streamed(
        **_shape(section),
        framing=section.framing,
        path=section.path or "",
        switch=section.switch,
        grows=section.grows,
        done=section.done,
    )


def _shape(section: AnswerSection) -> dict[str, Any]:
    return {name: getattr(section, name) for name in AnswerSection.model_fields}
