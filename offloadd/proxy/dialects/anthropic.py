"""Anthropic's requests: what they mean for an engine that speaks OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from offloadd.errors import RequestError
from offloadd.proxy.dialects.typed import decode, unknown_fields

Object = dict[str, Any]

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"


class Base64(Struct, tag="base64", tag_field="type"):
    """Bytes of an image or a document."""

    media_type: str
    data: str


class Url(Struct, tag="url", tag_field="type"):
    """The same, somewhere else."""

    url: str


class PlainText(Struct, tag="text", tag_field="type"):
    """A document that is text."""

    data: str
    media_type: str = "text/plain"


class Text(Struct, tag="text", tag_field="type"):
    """Text of either side."""

    text: str


class Image(Struct, tag="image", tag_field="type"):
    """A picture that the model is to see."""

    source: Base64 | Url


class Document(Struct, tag="document", tag_field="type"):
    """A document that the model is to read."""

    source: Base64 | Url | PlainText
    title: str | None = None
    context: str | None = None


class ToolUse(Struct, tag="tool_use", tag_field="type"):
    """The model calls a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Struct, tag="tool_result", tag_field="type"):
    """What the tool answered."""

    tool_use_id: str
    content: str | list[Text | Image | Document] = ""
    is_error: bool | None = None


class Thinking(Struct, tag="thinking", tag_field="type"):
    """What the model thought before it spoke."""

    thinking: str
    signature: str = ""


class RedactedThinking(Struct, tag="redacted_thinking", tag_field="type"):
    """The same, not readable: no engine here can use it."""

    data: str = ""


Block = Text | Image | Document | ToolUse | ToolResult | Thinking | RedactedThinking


class Message(Struct):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Struct):
    """A tool of the client's. Those with another `type` run at Anthropic."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    """Whether and which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingSwitch(Struct):
    """Whether the model is to think first."""

    type: str
    budget_tokens: int | None = None


class Metadata(Struct):
    """About the caller."""

    user_id: str | None = None


class MessagesRequest(Struct):
    """`POST /v1/messages`, and `count_tokens`."""

    messages: list[Message]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[Text] | None = None
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingSwitch | None = None
    metadata: Metadata | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


_ANTHROPICS_OWN = frozenset(
    {
        "service_tier",
        "container",
        "context_management",
        "mcp_servers",
        "betas",
        "inference_geo",
        "speed",
        "cache_control",
        "backend",
    }
)
"""Fields about Anthropic's own service: an engine here has no use for them, and a strict one would refuse them."""


def to_chat(fields: Object) -> Object:
    """The chat completion that a messages request means; RequestError 400 says what of it is wrong. Unknown fields pass."""
    asked = decode(fields, MessagesRequest)
    simple: Object = {"model": asked.model, "max_tokens": asked.max_tokens, "stop": asked.stop_sequences or None}
    simple |= {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
    simple |= {"user": asked.metadata.user_id if asked.metadata else None}
    body: Object = {name: value for name, value in simple.items() if value is not None}
    body["messages"] = [*_system(asked.system), *(said for message in asked.messages for said in chat_messages(message))]
    return {
        **unknown_fields(fields, MessagesRequest, _ANTHROPICS_OWN),
        **body,
        **_tools(asked),
        **_thinking(asked),
        **_format(asked),
    }


def chat_messages(message: Message) -> list[Object]:
    """One of Anthropic's messages as one or more of OpenAI's: results of tools are messages of their own there, and come first."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant(message.content)]
    results = [_tool_message(block) for block in message.content if isinstance(block, ToolResult)]
    pictures = [part for block in message.content if isinstance(block, ToolResult) for part in _pictures(block)]
    rest = [block for block in message.content if isinstance(block, Text | Image | Document)]
    parts = [*pictures, *map(_part, rest)]
    return [*results, *([{"role": message.role, "content": _simplest(parts)}] if parts or not results else [])]


def _system(system: str | list[Text] | None) -> list[Object]:
    text = system if isinstance(system, str) else "\n".join(block.text for block in system or ())
    return [{"role": "system", "content": text}] if text else []


def _assistant(blocks: Sequence[Block]) -> Object:
    text = "".join(block.text for block in blocks if isinstance(block, Text))
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, Thinking))
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    said: Object = {"role": "assistant", "content": text if text or not calls else None}
    return {**said, **({"reasoning_content": thoughts} if thoughts else {}), **({"tool_calls": calls} if calls else {})}


def _call(block: ToolUse) -> Object:
    arguments = msgspec.json.encode(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool_message(block: ToolResult) -> Object:
    texts = [block.content] if isinstance(block.content, str) else [_read(part) for part in block.content]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": "\n".join(text for text in texts if text)}


def _read(block: Text | Image | Document) -> str:
    """The text of a part of a tool's result; a picture goes into the message after it."""
    if isinstance(block, Text):
        return block.text
    return _document(block) if isinstance(block, Document) else ""


def _pictures(block: ToolResult) -> Iterable[Object]:
    return (_part(part) for part in block.content if isinstance(part, Image)) if isinstance(block.content, list) else ()


def _part(block: Text | Image | Document) -> Object:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text}
    if isinstance(block, Document):
        return {"type": "text", "text": _document(block)}
    source = block.source
    url = source.url if isinstance(source, Url) else f"data:{source.media_type};base64,{source.data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: Document) -> str:
    if not isinstance(block.source, PlainText):
        message = "only documents that are plain text can be given to a model here; convert it, or send its pages as images"
        raise RequestError(400, "unsupported_capability", message, param="messages")
    return "\n".join(text for text in (block.title, block.context, block.source.data) if text)


def _simplest(parts: Sequence[Object]) -> str | list[Object]:
    """Text alone as text: some engines' templates take nothing else."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return list(parts) if parts else ""


def _tools(asked: MessagesRequest) -> Object:
    found: Object = {}
    if asked.tools:
        found["tools"] = [_tool(tool) for tool in asked.tools]
    choice = asked.tool_choice
    if choice is None or not asked.tools:
        return found
    named = {"type": "function", "function": {"name": choice.name}}
    found["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    if choice.disable_parallel_tool_use:
        found["parallel_tool_calls"] = False
    return found


def _tool(tool: Tool) -> Object:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        message = (
            f'the tool "{tool.name[:64]}" ({str(tool.type)[:64]}) runs at Anthropic; only tools with an input_schema can be used'
        )
        raise RequestError(400, "unsupported_capability", message, param="tools")
    function: Object = {"name": tool.name, "parameters": tool.input_schema}
    optional = {"description": tool.description, "strict": tool.strict}
    return {"type": "function", "function": function | {name: value for name, value in optional.items() if value is not None}}


def _thinking(asked: MessagesRequest) -> Object:
    """Templates that can think or not are told by this name; others do not look at it."""
    if asked.thinking is None:
        return {}
    return {"chat_template_kwargs": {"enable_thinking": asked.thinking.type != "disabled"}}


def _format(asked: MessagesRequest) -> Object:
    wanted = asked.output_format or (asked.output_config or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return {}
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": wanted.get("schema"), "strict": True},
        }
    }
