"""`POST /inference`: offloadd's own small shape, for scripts and tests. Prompt or messages in, text out."""

from __future__ import annotations

from typing import Any

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.openai import CHAT, COMPLETIONS
from offloadd.proxy.dialects.refusals import event_error

Object = dict[str, Any]


def translate(body: Object) -> tuple[str, Object]:
    """The OpenAI path and body that the request means; every field but ours passes as it is."""
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise RequestError(400, "invalid_body", 'give either "prompt" or "messages"', param="prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise RequestError(400, "invalid_body", '"prompt" must be text', param="prompt")
    if messages is not None and not isinstance(messages, list):
        raise RequestError(400, "invalid_body", '"messages" must be a list', param="messages")
    passed = {key: value for key, value in body.items() if key != "backend"}
    return (COMPLETIONS if messages is None else CHAT), passed


def answer(collected: Object, origin: Object) -> Object:
    """The plain answer from OpenAI's; `origin` names model, backend and instance."""
    choice = collected["choices"][0]
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    return {
        **origin,
        "text": text or "",
        "finish_reason": choice.get("finish_reason"),
        "usage": collected.get("usage"),
        "timings": collected.get("timings"),
    }


class PlainStream:
    """Turns OpenAI's chunks into plain events: `{"text"}` for each piece, one with the rest at the end, and `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, origin: Object) -> None:
        self._reader = sse.EventReader()
        self._last: Object = {**origin, "text": "", "finish_reason": None, "usage": None, "timings": None}
        self._failed = False

    def feed(self, chunk: bytes) -> bytes:
        """Events for the text that the chunk brings."""
        return b"".join(self._piece(sse.decode(payload)) for payload in self._reader.feed(chunk))

    def end(self) -> bytes:
        """The closing events; nothing after an error."""
        if self._failed:
            return b""
        if self._last["finish_reason"] is None:
            raise sse.CutStreamError
        return sse.event(self._last) + sse.DONE

    def fail(self, error: RequestError) -> bytes:
        """An event with OpenAI's error object, and no `[DONE]`."""
        return sse.event(error.body)

    def _piece(self, chunk: Object) -> bytes:
        if "error" in chunk:
            self._failed = True
            return self.fail(event_error(chunk))
        self._last.update({key: chunk[key] for key in ("usage", "timings") if chunk.get(key) is not None})
        pieces = [self._text_of(choice) for choice in chunk.get("choices") or ()]
        return b"".join(sse.event({"text": piece}) for piece in pieces if piece)

    def _text_of(self, choice: Object) -> str:
        self._last["finish_reason"] = choice.get("finish_reason") or self._last["finish_reason"]
        return (choice.get("delta") or {}).get("content") or choice.get("text") or ""
