"""Requests for OpenAI's responses: what they mean for an engine that speaks its chat completions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Struct

from offloadd.errors import RequestError
from offloadd.proxy.dialects.typed import decode, unknown_fields

Object = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
"""What `include` says for the probabilities of tokens."""
_STORED = {"previous_response_id": "input", "conversation": "input", "prompt": "instructions"}
"""Fields that name what OpenAI keeps, and where to write that instead."""


class InputText(Struct, tag="input_text", tag_field="type"):
    """Text of the user's side."""

    text: str


class OutputText(Struct, tag="output_text", tag_field="type"):
    """Text of the model's side."""

    text: str


class Refusal(Struct, tag="refusal", tag_field="type"):
    """The model said that it will not."""

    refusal: str


class InputImage(Struct, tag="input_image", tag_field="type"):
    """A picture, by URL or with its bytes in one."""

    image_url: str | None = None
    detail: str | None = None


class InputAudio(Struct, tag="input_audio", tag_field="type"):
    """Sound, with its bytes."""

    input_audio: dict[str, Any]


class InputFile(Struct, tag="input_file", tag_field="type"):
    """A document."""

    filename: str | None = None


Part = InputText | OutputText | Refusal | InputImage | InputAudio | InputFile


class Message(Struct, tag="message", tag_field="type"):
    """What one side said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class FunctionCall(Struct, tag="function_call", tag_field="type"):
    """The model calls a function."""

    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Struct, tag="function_call_output", tag_field="type"):
    """What the function gave."""

    call_id: str
    output: str | list[Part]


class ReasoningText(Struct):
    """A piece of a thought, or of its summary."""

    text: str = ""


class Reasoning(Struct, tag="reasoning", tag_field="type"):
    """What the model thought before it spoke. What is encrypted of it no engine here can read."""

    summary: list[ReasoningText] = []
    content: list[ReasoningText] | None = None


class ItemReference(Struct, tag="item_reference", tag_field="type"):
    """An item that OpenAI keeps."""

    id: str


Item = Message | FunctionCall | FunctionCallOutput | Reasoning | ItemReference


class Tool(Struct):
    """A function of the client's. Those of another `type` run at OpenAI."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Format(Struct):
    """The shape that the text is to have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """About the text."""

    format: Format | None = None


class ReasoningOptions(Struct):
    """How long the model is to think."""

    effort: str | None = None


class ResponsesRequest(Struct):
    """`POST /v1/responses`."""

    input: str | list[Item] = ""
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None


_OPENAIS_OWN = frozenset(
    {
        *("backend", "background", "context_management", "max_tool_calls", "metadata", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "stream_options", "truncation", *_STORED),
    }
)
"""Fields about OpenAI's own service, or of no meaning to a chat: a strict engine would refuse them."""


def check_stateless(fields: Mapping[str, Any]) -> None:
    """RequestError 400 for a request that counts on something being kept: nothing is, whatever the engine."""
    for name, instead in _STORED.items():
        if fields.get(name) is not None:
            message = f'"{name}": no responses are stored here: send the whole conversation each time, as "{instead}"'
            raise RequestError(400, "unsupported_capability", message, param=name)
    for name in ("store", "background"):
        if fields.get(name):
            message = f'"{name}": no responses are stored here: leave it out, or set it to false'
            raise RequestError(400, "unsupported_capability", message, param=name)


def to_chat(fields: Object) -> Object:
    """The chat completion that a responses request means; RequestError 400 says what of it is wrong. Unknown fields pass."""
    check_stateless(fields)
    asked = decode({**fields, "input": _with_types(fields.get("input"))}, ResponsesRequest)
    simple: Object = {"model": asked.model, "max_tokens": asked.max_output_tokens}
    simple |= {"temperature": asked.temperature, "top_p": asked.top_p}
    simple |= {"reasoning_effort": asked.reasoning.effort if asked.reasoning else None}
    messages = chat_messages(asked.input, asked.instructions)
    if not messages:
        raise RequestError(400, "invalid_body", '"input" must be a text or a list with at least one item', param="input")
    return {
        **unknown_fields(fields, ResponsesRequest, _OPENAIS_OWN),
        **{name: value for name, value in simple.items() if value is not None},
        "messages": messages,
        **_tools(asked),
        **_format(asked.text),
        **_logprobs(asked),
    }


def chat_messages(given: str | Sequence[Item], instructions: str | None = None) -> list[Object]:
    """The items as OpenAI's messages: a thought, a text and calls that follow each other are one message of the model's."""
    items: Sequence[Item] = [Message(role="user", content=given)] if isinstance(given, str) else given
    writing = _Writing()
    if instructions:
        writing.add(Message(role="system", content=instructions))
    for item in items if given else ():
        writing.add(item)
    return writing.done()


@dataclass(slots=True)
class _Writing:
    """Messages while items become them. What the model said is gathered until something else comes."""

    messages: list[Object] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[Object] = field(default_factory=list)

    def add(self, item: Item) -> None:
        match item:
            case Message(role="assistant"):
                if self.text is not None or self.calls:
                    self._close()
                self.text = _plain(item.content)
            case FunctionCall():
                function = {"name": item.name, "arguments": item.arguments}
                self.calls.append({"id": item.call_id, "type": "function", "function": function})
            case Reasoning():
                self.thoughts += [piece.text for piece in item.content or item.summary]
            case FunctionCallOutput():
                self._close()
                self._output(item)
            case Message():
                self._close()
                self._said(item)
            case ItemReference():
                message = f'the item "{item.id[:64]}" is not stored here: send it whole, as it came'
                raise RequestError(400, "unsupported_capability", message, param="input")

    def done(self) -> list[Object]:
        self._close()
        return self.messages

    def _close(self) -> None:
        if self.text is not None or self.calls:
            said: Object = {"role": "assistant", "content": self.text}
            thought = "\n".join(self.thoughts)
            said |= {"reasoning_content": thought} if thought else {}
            self.messages.append({**said, "tool_calls": self.calls} if self.calls else said)
        self.thoughts, self.text, self.calls = [], None, []

    def _said(self, item: Message) -> None:
        """A system prompt of several parts is one: many templates take it at the beginning only."""
        if item.role == "user":
            self.messages.append({"role": "user", "content": _content(item.content)})
            return
        text = _plain(item.content)
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += f"\n{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def _output(self, item: FunctionCallOutput) -> None:
        """A message of a tool is text; pictures that it gave are shown by the user."""
        parts = [] if isinstance(item.output, str) else item.output
        seen = [_part(part) for part in parts if isinstance(part, InputImage | InputAudio)]
        text = item.output if isinstance(item.output, str) else _plain([part for part in parts if not _is_seen(part)])
        self.messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
        if seen:
            self.messages.append({"role": "user", "content": seen})


def _with_types(given: object) -> object:
    """The items with their types: a message may come without."""
    if not isinstance(given, list):
        return "" if given is None else given
    return [{"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in given]


def _content(content: str | Sequence[Part]) -> str | list[Object]:
    """Text alone as text: some engines' templates take nothing else."""
    if isinstance(content, str) or not any(map(_is_seen, content)):
        return _plain(content)
    return [_part(part) for part in content]


def _is_seen(part: Part) -> bool:
    return isinstance(part, InputImage | InputAudio)


def _plain(content: str | Iterable[Part]) -> str:
    return content if isinstance(content, str) else "\n".join(_text(part) for part in content)


def _text(part: Part) -> str:
    if isinstance(part, InputText | OutputText):
        return part.text
    if isinstance(part, Refusal):
        return part.refusal
    if isinstance(part, InputFile):
        message = f'the file "{(part.filename or "")[:64]}" cannot be read here: send its text, or its pages as images'
        raise RequestError(400, "unsupported_capability", message, param="input")
    raise RequestError(400, "invalid_body", "only text can stand here, neither pictures nor sound", param="input")


def _part(part: Part) -> Object:
    if isinstance(part, InputAudio):
        return {"type": "input_audio", "input_audio": part.input_audio}
    if not isinstance(part, InputImage):
        return {"type": "text", "text": _text(part)}
    if part.image_url is None:
        message = "no files are stored here: a picture needs its image_url, which may be a data URL"
        raise RequestError(400, "unsupported_capability", message, param="input")
    shown: Object = {"url": part.image_url}
    return {"type": "image_url", "image_url": {**shown, "detail": part.detail} if part.detail else shown}


def _tools(asked: ResponsesRequest) -> Object:
    tools = asked.tools or []
    for tool in tools:
        if tool.type != "function" or tool.name is None:
            message = f'a tool of type "{tool.type[:64]}" is not offered here; only functions of the client\'s, with a name, are'
            raise RequestError(400, "unsupported_capability", message, param="tools")
    if not tools:
        return {}
    choice, allowed = _choice(asked.tool_choice)
    found: Object = {"tools": [_tool(tool) for tool in tools if allowed is None or tool.name in allowed]}
    if not found["tools"]:
        raise RequestError(400, "invalid_body", "tool_choice allows none of the tools", param="tool_choice")
    if choice is not None:
        found["tool_choice"] = choice
    if asked.parallel_tool_calls is not None:
        found["parallel_tool_calls"] = asked.parallel_tool_calls
    return found


def _tool(tool: Tool) -> Object:
    optional = {"description": tool.description, "strict": tool.strict}
    function: Object = {"name": tool.name, "parameters": tool.parameters or {"type": "object", "properties": {}}}
    return {"type": "function", "function": function | {name: value for name, value in optional.items() if value is not None}}


def _choice(choice: str | Object | None) -> tuple[str | Object | None, frozenset[str] | None]:
    """The choice in a chat's words, and the only tools that it leaves, if it does."""
    match choice:
        case None | "auto" | "none" | "required":
            return choice, None
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}, None
        case {"type": "allowed_tools", "tools": list(tools), "mode": "auto" | "required" as mode}:
            return mode, frozenset(str(tool.get("name")) for tool in tools if isinstance(tool, dict))
    message = "tool_choice is none of auto, none, required, a function's name, or allowed_tools of functions"
    raise RequestError(400, "unsupported_capability", message, param="tool_choice")


def _format(text: TextOptions | None) -> Object:
    wanted = text.format if text else None
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    optional = {"description": wanted.description, "strict": wanted.strict}
    schema: Object = {"name": wanted.name or "answer", "schema": wanted.schema}
    schema |= {name: value for name, value in optional.items() if value is not None}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _logprobs(asked: ResponsesRequest) -> Object:
    if LOGPROBS not in (asked.include or ()):
        return {}
    return {"logprobs": True, **({} if asked.top_logprobs is None else {"top_logprobs": asked.top_logprobs})}
