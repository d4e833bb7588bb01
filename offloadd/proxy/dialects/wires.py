"""Engines with JSON of their own: OpenAI's chat and text completions in their words, and their answers in OpenAI's.

Where things stand is the config's word (`state/wire.py`). All other dialects come as OpenAI's and go through here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from offloadd.backends.pointers import find, put, written
from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Object
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS
from offloadd.proxy.dialects.refusals import event_error
from offloadd.state.wire import Answer, Framing, Messages, Pointer, Streamed, Wire

MAX_WHOLE = 64 * 2**20
"""An answer that is no stream is read whole up to this size."""
_MAX_EVENT = 8 * 2**20
_BRIEFLY = 500
_REASONS = frozenset({"stop", "length", "content_filter"})
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SYNONYMS = {"max_tokens": "max_completion_tokens"}
_NOT_AT_ALL = ("tools", "functions", "echo", "suffix", "logprobs", "top_logprobs", "audio")
"""What no declared answer could hold."""
_IF_DECLARED = ("stop", "json_schema", "grammar")
"""What changes the answer so much that leaving it out would give another one."""
_KINDS = {CHAT: ("chat.completion", "chat.completion.chunk"), COMPLETIONS: ("text_completion", "text_completion")}


class Exchanged:
    """One request to such an engine and its answer. Made of the OpenAI request that the engine is meant to answer."""

    def __init__(self, wire: Wire, path: str, asked: Object, created: int) -> None:
        """RequestError 400 when the engine cannot do what is asked. `created` is now, in seconds since 1970."""
        self._wire = wire
        self._chat = path == CHAT
        self._kinds = _KINDS[path]
        self._wanted = bool(asked.get("stream"))
        self._shape: Answer
        streams = wire.streams(wanted=self._wanted)
        if streams and wire.stream is not None:
            self._shape = wire.stream
            self.path = wire.stream.path or wire.path
            self._reader: _Reader = _Lines(sse=wire.stream.framing is Framing.SSE)
        else:
            assert wire.answer is not None  # noqa: S101  (it has one or the other)
            self._shape = wire.answer
            self.path = wire.path
            self._reader = _Whole()
        self.body = msgspec.json.encode(to_engine(wire, path, asked, stream=streams))
        self._head: Object = {"created": created, "model": asked.get("model")}
        self._heard = _Heard(wire, self._shape)
        self._said: list[str] = []
        self._begun = False

    @property
    def media_type(self) -> bytes:
        """Of what comes out."""
        return b"text/event-stream" if self._wanted else b"application/json"

    def feed(self, piece: bytes) -> bytes:
        """What a piece of the engine's answer becomes; BrokenStreamError when it is not as declared."""
        return b"".join([self._event(document) for document in self._reader.feed(piece)])

    def end(self) -> bytes:
        """What closes the answer. A stream that was cut is left without its end; of a whole one, CutStreamError tells."""
        last = b"".join([self._event(document) for document in self._reader.end()])
        if self._heard.error is not None:
            if not self._wanted:
                raise event_error(self._heard.error)
            return last
        if not self._heard.complete:
            if not self._wanted:
                raise sse.CutStreamError
            return last
        return last + (self._closing() if self._wanted else self._whole())

    def refusal(self, body: bytes) -> bytes:
        """The engine's refusal with its message where others have it. It is seldom a stream, whatever was asked for."""
        try:
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return body
        shapes = (self._shape, self._wire.answer, self._wire.stream)
        places = [shape.error for shape in shapes if shape is not None and shape.error is not None]
        found = next((error for place in places if (error := _error(find(document, place)))), None)
        return body if found is None else msgspec.json.encode(found)

    def _event(self, document: Any) -> bytes:
        """One of the engine's events, or its whole answer."""
        if self._heard.failed:
            return b""
        text = self._heard.take(document)
        if error := self._heard.error:
            return sse.event(error) if self._wanted else b""
        if not self._wanted:
            self._said.append(text)
            return b""
        return self._first() + (self._chunk({"content": text}, text) if text else b"")

    def _first(self) -> bytes:
        if self._begun or not self._chat:
            return b""
        self._begun = True
        return self._chunk({"role": "assistant", "content": ""}, "")

    def _chunk(self, delta: Object, text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, **({"delta": delta} if self._chat else {"text": text}), "finish_reason": finish}
        return sse.event({**self._head, "object": self._kinds[1], "choices": [choice]})

    def _closing(self) -> bytes:
        last = self._first() + self._chunk({}, "", self._heard.finish or "stop")
        usage = self._heard.usage
        counts = sse.event({**self._head, "object": self._kinds[1], "choices": [], "usage": usage}) if usage else b""
        return last + counts + sse.DONE

    def _whole(self) -> bytes:
        text = "".join(self._said)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text, "logprobs": None}
        choice = {"index": 0, **said, "finish_reason": self._heard.finish or "stop"}
        usage = {"usage": self._heard.usage} if self._heard.usage else {}
        return msgspec.json.encode({**self._head, "object": self._kinds[0], "choices": [choice], **usage})


# --- the request ---


def to_engine(wire: Wire, path: str, asked: Mapping[str, Any], *, stream: bool) -> Object:
    """The request in the engine's words; RequestError 400 names what it cannot do."""
    _check(wire, asked)
    body = copy.deepcopy(dict(wire.body))
    for pointer, value in _parts(wire, path, asked, stream=stream):
        put(body, pointer, value)
    return body


def _parts(wire: Wire, path: str, asked: Mapping[str, Any], *, stream: bool) -> Iterator[tuple[Pointer, Any]]:
    if path == CHAT:
        yield from _conversation(wire, _said(asked.get("messages")))
    elif wire.prompt is not None:
        yield wire.prompt, _prompt(asked.get("prompt"))
    else:
        raise _cannot("text completions", "prompt")
    for name, pointer in wire.parameters.items():
        value = asked.get(name)
        if value is None and name in _SYNONYMS:
            value = asked.get(_SYNONYMS[name])
        if value is not None:
            yield pointer, [value] if name == "stop" and isinstance(value, str) else value
    if wire.model is not None:
        yield wire.model, asked.get("model")
    if wire.stream is not None and wire.stream.switch is not None:
        yield wire.stream.switch, stream


def _check(wire: Wire, asked: Mapping[str, Any]) -> None:
    for name in _NOT_AT_ALL:
        if asked.get(name):
            raise _cannot(name, name)
    for name in _IF_DECLARED:
        if asked.get(name) and name not in wire.parameters:
            raise _cannot(name, name)
    for name in ("n", "best_of"):
        if asked.get(name) not in (None, 1):
            raise _cannot(f"more than one answer ({name})", name)
    form = asked.get("response_format")
    if form and "response_format" not in wire.parameters and not (isinstance(form, dict) and form.get("type") == "text"):
        raise _cannot("response_format", "response_format")
    modalities = asked.get("modalities")
    if modalities and modalities != ["text"]:
        raise _cannot("any answer but text", "modalities")


def _cannot(what: str, param: str) -> RequestError:
    message = f"this engine does not offer {what}: its own API, as the config declares it, has no place for it"
    return RequestError(400, "unsupported_capability", message, param=param)


def _prompt(prompt: object) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestError(400, "invalid_body", '"prompt" must be one text', param="prompt")
    return prompt


def _said(messages: object) -> list[tuple[str, str]]:
    """Who said what, in order."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "invalid_body", '"messages" must be a list with messages', param="messages")
    return [_message(each, f"messages.{place}") for place, each in enumerate(messages)]


def _message(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RequestError(400, "invalid_body", f"{where} must be an object", param=where)
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls"):
        raise _cannot("tools", where)
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(400, "invalid_body", f"{where}.role must be one of {', '.join(_ROLES)}", param=where)
    return _ROLES[role], "".join(_texts(message.get("content"), where))


def _texts(content: object, where: str) -> Iterator[str]:
    if isinstance(content, str) or content is None:
        yield content or ""
        return
    parts: list[Any] = content if isinstance(content, list) else [content]
    for part in parts:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "text" and isinstance(text, str):
            yield text
        elif kind not in (None, "text"):
            raise _cannot(f"content of type {str(kind)[:32]}", where)
        else:
            raise RequestError(400, "invalid_body", f"{where}.content must be text", param=where)


def _conversation(wire: Wire, said: list[tuple[str, str]]) -> Iterator[tuple[Pointer, Any]]:
    if wire.messages is not None:
        yield from _listed(wire.messages, said)
    elif wire.prompt is not None and wire.turns is not None:
        shapes = {"system": wire.turns.system, "user": wire.turns.user, "assistant": wire.turns.assistant}
        yield wire.prompt, "".join(shapes[role].replace("${text}", text) for role, text in said) + wire.turns.open
    else:
        raise _cannot("chat", "messages")


def _listed(shape: Messages, said: Iterable[tuple[str, str]]) -> Iterator[tuple[Pointer, Any]]:
    apart = [] if shape.system is None else [text for role, text in said if role == "system"]
    if shape.system is not None and apart:
        yield shape.system, "\n\n".join(apart)
    kept = [(role, text) for role, text in said if shape.system is None or role != "system"]
    yield shape.at, [{shape.role: shape.roles.get(role, role), shape.content: text} for role, text in kept]


# --- the answer ---


class _Reader:
    """Makes JSON values of an answer's bytes, wherever they were cut."""

    def feed(self, piece: bytes) -> Iterator[Any]:
        """Those that the piece completes."""
        raise NotImplementedError

    def end(self) -> Iterator[Any]:
        """Those that the end completes."""
        raise NotImplementedError


class _Whole(_Reader):
    """One value: all of it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[Any]:
        self._size += len(piece)
        if self._size > MAX_WHOLE:
            raise sse.BrokenStreamError(f"an answer of more than {MAX_WHOLE} bytes")
        self._parts.append(piece)
        return iter(())

    def end(self) -> Iterator[Any]:
        yield _decode(b"".join(self._parts))


class _Lines(_Reader):
    """One value a line, or a `data:` line."""

    def __init__(self, *, sse: bool) -> None:
        self._sse = sse
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Any]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _MAX_EVENT:
            raise sse.BrokenStreamError(f"an event of more than {_MAX_EVENT} bytes")
        return self._values(lines)

    def end(self) -> Iterator[Any]:
        last, self._rest = self._rest, b""
        return self._values([last])

    def _values(self, lines: Iterable[bytes]) -> Iterator[Any]:
        for line in lines:
            payload = line.strip()
            if self._sse:
                name, _, value = payload.partition(b":")
                payload = value.strip() if name == b"data" else b""
            if payload and payload != b"[DONE]":
                yield _decode(payload)


def _decode(payload: bytes) -> Any:
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise sse.BrokenStreamError(f"what it sent is not JSON: {error}") from None


class _Heard:
    """What an answer has said so far."""

    def __init__(self, wire: Wire, shape: Answer) -> None:
        self._shape = shape
        self._stream = shape if isinstance(shape, Streamed) else None
        self._reasons = wire.finish_reasons
        self._text = ""
        self._counts: list[int | None] = [None, None]
        self._ended = False
        self.finish: str | None = None
        """OpenAI's word for how it ended."""
        self.error: Object | None = None
        """OpenAI's object for what went wrong."""

    @property
    def failed(self) -> bool:
        """Whether something went wrong: what comes after is not looked at."""
        return self.error is not None

    @property
    def complete(self) -> bool:
        """Whether the answer has said that it is whole. One that has no word for that is whole at its end."""
        if self._stream is None:
            return True
        if self._stream.done is not None:
            return self._ended
        return self.finish is not None or self._stream.finish_reason is None

    @property
    def usage(self) -> Object | None:
        """OpenAI's counts, when both were told."""
        prompt, made = self._counts
        if prompt is None or made is None:
            return None
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def take(self, document: Any) -> str:
        """The text that an event brings, or the answer has; the rest is kept."""
        shape = self._shape
        self.error = None if shape.error is None else _error(find(document, shape.error))
        if self.error is not None:
            return ""
        if shape.finish_reason is not None:
            self.finish = self._reason(find(document, shape.finish_reason)) or self.finish
        if self._stream is not None and self._stream.done is not None:
            self._ended = self._ended or bool(find(document, self._stream.done))
        for place, pointer in enumerate((shape.prompt_tokens, shape.completion_tokens)):
            count = None if pointer is None else find(document, pointer)
            if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
                self._counts[place] = count
        return self._new(find(document, shape.text))

    def _new(self, text: object) -> str:
        if text is None and self._stream is not None:
            return ""  # not every event brings some
        if not isinstance(text, str):
            what = "nothing" if text is None else "no text"
            raise sse.BrokenStreamError(f"there is {what} at {written(self._shape.text) or 'the top'} of what it sent")
        if self._stream is None or not self._stream.grows:
            return text
        if not text.startswith(self._text):
            raise sse.BrokenStreamError("it changed text that it had sent before")
        new, self._text = text[len(self._text) :], text
        return new

    def _reason(self, found: object) -> str | None:
        if not found:
            return None
        word = found if isinstance(found, str) else msgspec.json.encode(found).decode()
        return self._reasons.get(word, word if word in _REASONS else "stop")


def _error(found: object) -> Object | None:
    """OpenAI's object for an error that an engine tells in its own way."""
    if not found:
        return None
    text = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    return {"error": {"message": text[:_BRIEFLY]}}
