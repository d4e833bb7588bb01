"""Scopes: every route says what it needs, and one that was forgotten needs most."""

from __future__ import annotations

from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from offloadd.api.operations import OPERATIONS
from offloadd.api.scopes import UPSTREAM, scope_of
from offloadd.state.access import Caller, Scope


def matched(method: str, route: str, url: str, **params: str) -> web.Request:
    """A request as it looks when the router has found its route."""
    app = web.Application()
    resource = app.router.add_resource(route)
    request = make_mocked_request(method, url)
    request._match_info = web.UrlMappingMatchInfo(dict(params), resource.add_route("*", _never))
    return request


async def _never(_: web.Request) -> web.Response:
    raise AssertionError("not called")


def test_what_is_not_listed_needs_admin() -> None:
    assert scope_of(matched("POST", "/something/new", "/something/new")) is Scope.ADMIN


def test_a_method_that_is_not_listed_needs_admin() -> None:
    assert scope_of(matched("DELETE", "/models", "/models")) is Scope.ADMIN
    assert scope_of(matched("HEAD", "/models", "/models")) is Scope.READ


def test_nothing_that_changes_something_is_open_or_for_readers() -> None:
    changing = {each.scope for each in OPERATIONS.values() if each.method != "GET"}
    assert changing == {Scope.INFERENCE, Scope.ADMIN}


def test_the_route_counts_and_not_how_its_url_is_written() -> None:
    request = matched("GET", "/config", "/health/../config?x=/health")
    assert scope_of(request) is Scope.ADMIN
    # Were there a way to write a URL that is matched as one and reads as another, the match would count.
    assert scope_of(matched("GET", "/config", "/health")) is Scope.ADMIN
    assert scope_of(matched("GET", "/health", "/config")) is Scope.OPEN


def test_of_an_engines_own_paths_only_those_that_compute_are_for_users() -> None:
    def needs(method: str, path: str) -> Scope:
        return scope_of(matched(method, UPSTREAM.replace("{path}", "{path:.*}"), f"/upstream/m/{path}", model="m", path=path))

    assert needs("POST", "tokenize") is needs("POST", "v1/chat/completions") is Scope.INFERENCE
    for method, path in (("GET", "slots"), ("POST", "slots/0"), ("POST", "lora-adapters"), ("GET", "props"), ("POST", "sleep")):
        assert needs(method, path) is Scope.ADMIN


def test_admin_opens_everything_and_others_what_they_name() -> None:
    reader = Caller(name="r", scopes=frozenset({Scope.READ}))
    assert reader.may(Scope.OPEN)
    assert reader.may(Scope.READ)
    assert not reader.may(Scope.INFERENCE)
    assert all(Caller(name="a").may(scope) for scope in Scope)


def test_models_by_pattern_and_by_alias() -> None:
    some = Caller(name="k", models=("qwen-*", "gpt-4o"))
    assert some.may_use("qwen-3")
    assert some.may_use("llama", ("gpt-4o",))
    assert not some.may_use("llama", ("other",))
