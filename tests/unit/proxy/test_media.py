"""Addresses that engines would fetch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from offloadd.errors import RequestError
from offloadd.proxy.media import check_media

ALLOWED = frozenset({"images.example"})


def body(part: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, part]}]}).encode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "image_url", "image_url": {"url": "https://images.example/cat.png"}},
        {"type": "image_url", "image_url": "https://images.example:443/cat.png"},
        {"type": "input_image", "image_url": "https://IMAGES.example/cat.png"},
        {"type": "image", "source": {"type": "base64", "data": "aGVsbG8=", "media_type": "image/png"}},
        {"type": "text", "text": "see", "metadata": {"url": "http://169.254.169.254/"}},
        {"type": "text", "text": "read http://169.254.169.254/ for me"},
    ],
)
def test_what_comes_along_or_is_named_is_fine(part: Any) -> None:
    check_media(body(part), ALLOWED)


HOSTILE = [
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:9000/reload",
    "http://2130706433/",
    "http://[::ffff:127.0.0.1]/",
    "https://images.example.evil.example/x",
    "https://images.example@evil.example/x",
    "https://evil.example\\@images.example/x",
    "https://images.example\\.evil.example/x",
    "//images.example/x",
    "file:///etc/passwd",
    "ftp://images.example/x",
    "HTTP://evil.example/x",
    " https://images.example/x",
    "https://images.example\t/x",
    "https://im\u0430ges.example/x",
    "/etc/passwd",
    "",
]


@pytest.mark.parametrize("address", HOSTILE)
@pytest.mark.parametrize(
    "shape",
    [
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda url: {"type": "image_url", "image_url": url},
        lambda url: {"type": "video_url", "video_url": {"url": url}},
        lambda url: {"type": "image", "source": {"type": "url", "url": url}},
    ],
)
def test_what_leads_elsewhere_is_refused(address: str, shape: Any) -> None:
    with pytest.raises(RequestError, match="engines may not fetch from") as refusal:
        check_media(body(shape(address)), ALLOWED)
    assert (refusal.value.status, refusal.value.code) == (400, "media_not_allowed")


def test_keys_in_escapes_are_seen_too() -> None:
    raw = b'{"messages":[{"content":[{"im\\u0061ge_\\u0075rl":{"\\u0075\\u0072\\u006c":"http://evil.example"}}]}]}'
    with pytest.raises(RequestError):
        check_media(raw, ALLOWED)


def test_nothing_is_allowed_unless_named() -> None:
    with pytest.raises(RequestError):
        check_media(body({"type": "image_url", "image_url": {"url": "https://images.example/x"}}), ())


def test_depth_is_bounded() -> None:
    deep = b'{"url":' + b"[" * 200 + b"]" * 200 + b"}"
    with pytest.raises(RequestError, match="nested more than"):
        check_media(deep, ())


def test_no_json_is_for_the_engine_to_refuse() -> None:
    check_media(b'{"url": ', ())
    check_media(b"\xff url", ())
