"""Who makes a request."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from aiohttp.test_utils import make_mocked_request

from offloadd.api import caller as subject
from offloadd.api.caller import identify
from offloadd.errors import RequestError
from offloadd.state.access import ANYBODY, EVERYTHING, Access, ApiKey, Scope


def key(name: str, secret: str) -> ApiKey:
    return ApiKey(name=name, digest=hashlib.sha256(secret.encode()).digest())


ACCESS = Access(keys=(key("one", "first"), key("two", "second"), key("three", "third")))


def test_every_key_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes tells nothing of which key it was, or of how near a guess came."""
    compared: list[bytes] = []

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(subject, "compare_digest", counting)
    for shown in ("first", "third"):
        compared.clear()
        identify(make_mocked_request("GET", "/", {"Authorization": f"Bearer {shown}"}), ACCESS)
        assert compared == [each.digest for each in ACCESS.keys]
    compared.clear()
    with pytest.raises(RequestError):
        identify(make_mocked_request("GET", "/", {"Authorization": "Bearer none"}), ACCESS)
    assert len(compared) == len(ACCESS.keys)


def test_without_keys_everybody_may_do_everything() -> None:
    assert identify(make_mocked_request("GET", "/"), Access()) is EVERYTHING


def test_with_keys_nobody_may_do_anything_without_one() -> None:
    found = identify(make_mocked_request("GET", "/"), ACCESS)
    assert found is ANYBODY
    assert not any(found.may(scope) for scope in Scope if scope is not Scope.OPEN)


@pytest.mark.parametrize("header", ["Basic first", "first", "Bearer", "Bearer  "])
def test_what_is_no_bearer_is_no_key(header: str) -> None:
    assert identify(make_mocked_request("GET", "/", {"Authorization": header}), ACCESS) is ANYBODY
