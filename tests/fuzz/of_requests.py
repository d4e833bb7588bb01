"""What clients send: bodies of every dialect, forms, addresses of media."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from yarl import URL

from offloadd.errors import RequestError
from offloadd.proxy import affinity, routing
from offloadd.proxy.dialects import anthropic, ollama, openai, plain, tgi
from offloadd.proxy.dialects.multipart import Form, is_form
from offloadd.proxy.dialects.refusals import shaped
from offloadd.proxy.media import check_media
from offloadd.state.desired import ModelSpec, RequestRules
from offloadd.state.ids import BackendName, ModelName
from tests.fuzz.mutate import bent, mutated, mutated_text
from tests.fuzz.table import MIB, Parser

SPEC = ModelSpec(name=ModelName("m"), source="m.gguf", backends=(BackendName("llamacpp"),), context=4096)
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_PICTURE = "data:image/png;base64,aGVsbG8="
CHATS: list[Any] = [
    {"model": "m", "stream": True, "n": 2, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "tools": [_TOOL]},
    {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": _PICTURE}}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
    },
]
MESSAGES: list[Any] = [
    {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 10},
        "metadata": {"user_id": "u"},
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}],
            },
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "t"}, {"type": "tool_use", "id": "1", "name": "f", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}]},
            {
                "role": "user",
                "content": [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}}],
            },
        ],
    }
]
OLLAMA: list[Any] = [
    {
        "model": "m",
        "messages": [
            {"role": "user", "content": "hi", "images": ["aGk="]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        ],
        "options": {"num_predict": 5, "temperature": 0.5, "stop": ["a"], "num_ctx": 4096},
        "format": {"type": "object"},
        "keep_alive": "5m",
        "think": "high",
        "tools": [_TOOL],
    },
    {"model": "m", "prompt": "a", "suffix": "b", "system": "s", "template": "", "context": [1, 2], "raw": True, "keep_alive": -1},
    {"model": "m", "input": ["a", "b"], "truncate": True, "options": {}, "keep_alive": 0},
]
TGI: list[Any] = [
    {
        "inputs": "a",
        "parameters": {
            "max_new_tokens": 5,
            "details": True,
            "top_n_tokens": 2,
            "grammar": {"type": "json", "value": {"type": "object"}},
            "seed": 1,
            "stop": ["x"],
        },
        "stream": True,
    }
]
PLAIN: list[Any] = [
    {"model": "m", "prompt": "a", "backend": "llamacpp"},
    {"messages": [{"role": "user", "content": "a"}], "stream": True},
]


def refused(work: Callable[[], Any]) -> Any:
    """What the work gives, or None when it refuses with a status that is the client's fault; every dialect can say so."""
    try:
        return work()
    except RequestError as error:
        refusal = error
    assert 400 <= refusal.status < 500, refusal
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/generate"):
        msgspec.json.encode(shaped(path, refusal)[1])
    return None


def _body(rng: Random, corpus: list[Any]) -> bytes:
    data = json.dumps(bent(rng, rng.choice(corpus))).encode(errors="replace")
    return mutated(rng, [data], most=rng.choice((0, 0, 0, 3)))


_ALL = [*CHATS, *MESSAGES, *OLLAMA, *TGI, *PLAIN]
_RULES = RequestRules(set={"cache_prompt": True}, default={"temperature": 0.7}, remove=("logit_bias", "messages"))


def _heads(rng: Random) -> None:
    body = _body(rng, _ALL)
    head = refused(lambda: routing.read_head(body))
    fields = refused(lambda: routing.read_object(body))
    ruled = refused(lambda: routing.apply_rules(_RULES, body))
    assert (ruled is None) == (fields is None)
    if head is not None:
        assert head.model is None or isinstance(head.model, str)
        affinity.conversation(head.messages, head.prompt, head.prompt_cache_key)
    if fields is not None:
        openai.can_collect(openai.CHAT, fields)
        openai.as_stream(fields)


def _translated(corpus: list[Any], *translations: Callable[[dict[str, Any]], Any]) -> Callable[[Random], None]:
    def run(rng: Random) -> None:
        fields = refused(lambda: routing.read_object(_body(rng, corpus)))
        if fields is None:
            return
        for translate in translations:
            found = refused(lambda translate=translate: translate(fields))  # type: ignore[misc]
            msgspec.json.encode(found if isinstance(found, dict) else None)

    return run


def _ollama(part: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """The body for the engine stands last in what is given."""

    def translate(fields: dict[str, Any]) -> Any:
        asked, *_, body = part(fields)
        ollama.keep_alive(asked.keep_alive)
        ollama.not_heeded(getattr(asked, "options", None))
        return body

    return translate


_HOSTS = (
    "ok.example",
    "evil.example",
    "169.254.169.254",
    "2852039166",
    "[::ffff:169.254.169.254]",
    "0x7f.1",
    "ok.example.evil.example",
)
_FORMS = (
    "http://{0}/a",
    "https://{0}:443/a?b#c",
    "http://ok.example@{0}/",
    "http://{0}\\@ok.example/",
    "//{0}/x",
    "HTTP://{0}",
    "file:///{0}",
)
_FORMS += (
    "http://{0}#@ok.example/",
    "http://ok.example?@{0}/",
    "http:/{0}",
    "http:{0}",
    " http://{0}",
    "ftp://{0}/",
    "data:,{0}",
    "http://{0}%2f/",
)
_ADDRESSES = tuple(form.format(host) for form in _FORMS for host in _HOSTS)


def _media(rng: Random) -> None:
    """An address that passes leads to the allowed host by another parser too, and none passes where no host is allowed."""
    address = mutated_text(rng, _ADDRESSES, ("@", "\\", "#", "?", "/", ":", "%", ".", "ok.example", "\t"))
    part = rng.choice(({"image_url": address}, {"image_url": {"url": address}}, {"source": {"type": "url", "url": address}}))
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()
    if rng.random() < 0.3:
        body = body.replace(b'"url"', b'"\\u0075rl"').replace(b'"image_url"', b'"image\\u005furl"')
    is_data = address[:5].lower() == "data:"
    assert refused(lambda: check_media(body, ()) or True) == (True if is_data else None), address
    if refused(lambda: check_media(body, {"ok.example"}) or True) and not is_data:
        assert URL(address).host == "ok.example", address
        assert re.fullmatch(r"https?://ok\.example(:\d*)?([/?#].*)?", address, re.IGNORECASE), address


def _media_of_wrong_kinds(rng: Random) -> None:
    refused(lambda: check_media(_body(rng, [*CHATS, *MESSAGES]), {"ok.example"}))


_FORM = (
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--B\r\nContent-Disposition: form-data; name="file"; '
    b'filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n\x00\x01\r\n--\r\n--B--\r\n'
)
_TYPES = ("multipart/form-data; boundary=B", 'multipart/form-data; boundary="B"; x=y', "multipart/form-data; boundary*=utf-8''B")


def _forms(rng: Random) -> None:
    """Another name in a form changes nothing else of it."""
    body = mutated(rng, [_FORM], (b"--B", b"\r\n--B", b'name="model"', b"\r\n\r\n"))
    kind = mutated_text(rng, _TYPES, ("boundary=", ";", '"')) if rng.random() < 0.3 else _TYPES[0]
    is_form(kind)
    form = refused(lambda: Form(body, kind))
    if form is not None and form.text("model") is not None:
        other = form.replaced("model", "x")
        again = Form(other, kind)
        assert again.text("model") == "x"
        assert again.text("file") == form.text("file")


def _targets(rng: Random) -> None:
    """A path for an engine is one line of printable characters."""
    text = "/upstream/m/" + mutated_text(rng, ("v1/models?a=b", "a b", "../..//x", "%2e%2e/%00", "x\r\nHost: y"))
    try:
        url = URL(text, encoded=True)
    except ValueError:
        return
    if len(url.raw_path.split("/", 3)) > 3:
        found = refused(lambda: routing.upstream_target(url))
        assert found is None or re.fullmatch(r"/[\x21-\x7e]*", found)


PARSERS = (
    Parser("heads of bodies", "RequestError of the client's fault", _heads, 2000, 48 * MIB),
    Parser(
        "Anthropic's requests",
        "RequestError of the client's fault, or JSON",
        _translated(MESSAGES, anthropic.to_chat),
        1500,
        48 * MIB,
    ),
    Parser(
        "Ollama's requests",
        "RequestError of the client's fault, or JSON",
        _translated(OLLAMA, _ollama(ollama.chat), _ollama(ollama.generate), _ollama(ollama.embed), ollama.show),
        1500,
        48 * MIB,
    ),
    Parser(
        "TGI's requests",
        "RequestError of the client's fault, or JSON",
        _translated(TGI, lambda fields: tgi.to_completion(tgi.read(fields), SPEC)),
        1500,
        48 * MIB,
    ),
    Parser(
        "offloadd's own requests",
        "RequestError of the client's fault, or JSON",
        _translated(PLAIN, lambda f: plain.translate(f)[1]),
        1500,
        48 * MIB,
    ),
    Parser("addresses of media", "what passes leads to an allowed host, by two parsers", _media, 3000),
    Parser("bodies with media", "RequestError of the client's fault", _media_of_wrong_kinds, 1500, 48 * MIB),
    Parser("forms", "RequestError of the client's fault; one field changes and no other", _forms, 2000),
    Parser("paths for engines", "RequestError of the client's fault, or one printable line", _targets, 2000),
)
