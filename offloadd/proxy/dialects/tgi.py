"""TGI's own shape over any engine: `/generate` and its stream as text completions, and the answers as TGI gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.dialects.base import Change
from offloadd.proxy.dialects.refusals import tgi_body
from offloadd.proxy.dialects.turns import deltas
from offloadd.proxy.dialects.typed import decode
from offloadd.state.desired import ModelSpec

Object = dict[str, Any]

GENERATE = "/generate"
GENERATE_STREAM = "/generate_stream"
_USUAL_TOKENS = 1024
"""What TGI's own description says of a request without `max_new_tokens`."""
_SAMPLING = ("temperature", "top_k", "top_p", "typical_p")


class Grammar(Struct):
    """What the text must look like."""

    type: str
    value: Any


class Parameters(Struct):
    """TGI's parameters; one that is missing or null is left to the engine."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    stop_sequences: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class Generate(Struct):
    """`POST /generate`, `/generate_stream` and `/`. TGI serves one model and is not told which; here a name may come along."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None
    model: str | None = None

    @property
    def given(self) -> Parameters:
        """The parameters, all unset where there were none."""
        return self.parameters or Parameters()


_CANNOT = (
    ("truncate", "cutting the prompt (truncate)"),
    ("watermark", "watermarking"),
    ("decoder_input_details", "details of the prompt's tokens (decoder_input_details)"),
    ("adapter_id", "adapters by request (adapter_id)"),
)


def read(fields: Object) -> Generate:
    """The request; RequestError 400 says what is wrong with it."""
    asked = decode(fields, Generate)
    if asked.given.max_new_tokens is not None and asked.given.max_new_tokens <= 0:
        raise RequestError(400, "invalid_body", "Input validation error: `max_new_tokens` must be strictly positive")
    return asked


def to_completion(asked: Generate, spec: ModelSpec) -> Object:
    """The text completion that it means; RequestError 400 where no engine but TGI can do what it asks."""
    given = asked.given
    for name, what in _CANNOT:
        if getattr(given, name):
            raise RequestError(400, "unsupported_capability", f"{spec.name} does not offer {what}: only TGI does", param=name)
    if (given.best_of or 1) > 1:
        raise RequestError(400, "unsupported_capability", f"{spec.name} does not offer best_of: only TGI does", param="best_of")
    simple: Object = {name: getattr(given, name) for name in (*_SAMPLING, "frequency_penalty", "seed")}
    simple |= {"repeat_penalty": given.repetition_penalty, "repetition_penalty": given.repetition_penalty}
    simple["stop"] = [*(given.stop or ()), *(given.stop_sequences or ())] or None
    if not given.do_sample and all(getattr(given, name) is None for name in _SAMPLING):
        simple["temperature"] = 0  # greedy, as TGI is unless it is told otherwise
    body = {name: value for name, value in simple.items() if value is not None}
    # Ids and probabilities of tokens, in the words of each engine; what one does not know it does not look at.
    body |= {"logprobs": given.top_n_tokens or 1, "return_token_ids": True}
    return {
        **body,
        "prompt": asked.inputs,
        "max_tokens": given.max_new_tokens or min(_USUAL_TOKENS, spec.context // 2),
        **_grammar(given),
    }


def _grammar(given: Parameters) -> Object:
    if given.grammar is None:
        return {}
    kind, value = given.grammar.type, given.grammar.value
    schema = value.get("schema", value) if kind == "json_schema" and isinstance(value, dict) else value
    if kind not in ("json", "json_schema") or not isinstance(schema, dict):
        message = f'grammar: only "json" with a schema can be used here, not "{kind[:32]}"'
        raise RequestError(400, "unsupported_capability", message, param="grammar")
    # llama-server reads the first of these, vLLM the second.
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"json_schema": schema, "response_format": named}


@dataclass(slots=True)
class GenerateTurn:
    """TGI's tokens from the chunks of a text completion. The end comes as a token of its own, special and without text."""

    asked: Generate
    _text: list[str] = field(default_factory=list)
    _index: int = 0
    _finish: str = ""
    _usage: Object = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether a finish reason came."""
        return bool(self._finish)

    def add(self, event: Object) -> list[Object]:
        """One chunk, which may hold several tokens."""
        choice, _ = deltas(event)
        self._usage = event.get("usage") or self._usage
        self._finish = _reason(choice) or self._finish
        text = choice.get("text") or ""
        self._text.append(text)
        return [self._event(token, top) for token, top in _tokens(choice, text)]

    def finish(self) -> list[Object]:
        """The last event: the whole text, and the details."""
        last = self._event({"id": 0, "text": "", "logprob": 0.0, "special": True}, [])
        prompt = self.asked.inputs if self.asked.given.return_full_text else ""
        made = self._usage.get("completion_tokens")
        details = {
            "finish_reason": self._finish,
            "generated_tokens": self._index - 1 if made is None else made,
            "seed": self.asked.given.seed,
            "input_length": self._usage.get("prompt_tokens") or 0,
        }
        return [{**last, "generated_text": prompt + "".join(self._text), "details": details}]

    def refuse(self, error: RequestError) -> list[Object]:
        """An event with TGI's error."""
        return [tgi_body(error)]

    def _event(self, token: Object, top: list[Object]) -> Object:
        self._index += 1
        tops = {"top_tokens": top} if self.asked.given.top_n_tokens and top else {}
        return {"index": self._index, "token": token, **tops, "generated_text": None, "details": None}


def _reason(choice: Object) -> str:
    reason = choice.get("finish_reason")
    if not reason:
        return ""
    if reason == "length":
        return "length"
    return "stop_sequence" if isinstance(choice.get("stop_reason"), str) or reason == "stop_sequence" else "eos_token"


def _tokens(choice: Object, text: str) -> Iterable[tuple[Object, list[Object]]]:
    """The chunk's tokens and the likeliest others, from any shape of log probabilities; its text as one where there are none."""
    found = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or []
    if found.get("content"):
        for entry in found["content"]:
            yield _token(entry), [_token(other) for other in entry.get("top_logprobs") or ()]
    elif found.get("tokens"):
        probabilities, tops = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        for place, name in enumerate(found["tokens"]):
            number = ids[place] if place < len(ids) else 0
            entry = {"id": number, "token": name, "logprob": probabilities[place] if place < len(probabilities) else None}
            top = tops[place] if place < len(tops) else None
            yield _token(entry), [_token({"token": other, "logprob": value}) for other, value in (top or {}).items()]
    elif text:
        yield _token({"id": ids[0] if ids else 0, "token": text}), []


def _token(entry: Object) -> Object:
    return {"id": entry.get("id") or 0, "text": entry.get("token") or "", "logprob": entry.get("logprob"), "special": False}


class GenerateMerge:
    """The whole answer from the events."""

    def __init__(self, asked: Generate) -> None:
        self._asked = asked
        self._tokens: list[Object] = []
        self._tops: list[Object] = []
        self._last: Object = {}

    def add(self, event: Object) -> None:
        """Take one event in."""
        self._last = event
        if event["details"] is None:
            self._tokens.append(event["token"])
            self._tops.append(event.get("top_tokens", []))

    def answer(self) -> Object:
        """`generated_text`, and the details where they were asked for."""
        found = {"generated_text": self._last["generated_text"]}
        if not self._asked.given.details:
            return found
        told = {name: self._last["details"][name] for name in ("finish_reason", "generated_tokens", "seed")}
        tops = {"top_tokens": self._tops} if self._asked.given.top_n_tokens else {}
        return {**found, "details": {**told, "prefill": [], "tokens": self._tokens, **tops}}


class Untouched(Change):
    """TGI's own stream for TGI's own client: as it comes, and our errors in its words."""

    media_type = "text/event-stream"

    def feed(self, chunk: bytes) -> bytes:
        """The same bytes."""
        return chunk

    def end(self) -> bytes:
        """Nothing to add."""
        return b""

    def fail(self, error: RequestError) -> bytes:
        """An event with TGI's error, apart from one that may have been cut."""
        return b"\n\n" + sse.event(tgi_body(error))


def info(spec: ModelSpec, version: str) -> Object:
    """`GET /info`: the limits of the model, in TGI's words."""
    return {
        "model_id": spec.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": spec.queue.max_waiting + spec.parallel,
        "max_best_of": 1,
        "max_stop_sequences": 4,
        "max_input_tokens": max(1, spec.context - 1),
        "max_total_tokens": spec.context,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "offloadd",
        "version": version,
        "sha": None,
        "docker_label": None,
    }
