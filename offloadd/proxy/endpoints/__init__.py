"""Paths of the dialects that are translated: who is asked, and what for. The words themselves are for `dialects/` to say."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from offloadd.proxy import speech
from offloadd.proxy.account import Accounts
from offloadd.proxy.dialects.ollama_shelf import Sight
from offloadd.proxy.endpoints.anthropic import Messages
from offloadd.proxy.endpoints.ollama import Keep, Ollama
from offloadd.proxy.endpoints.responses import Responses
from offloadd.proxy.endpoints.tgi import Tgi
from offloadd.proxy.gateway import Gateway


def dialect_routes(
    gateway: Gateway, *, accounts: Accounts, api_of: speech.ApiOf, look: Callable[[], Sight], keep: Keep
) -> list[web.RouteDef]:
    """All of them. `look` is one reading of everything, for lists of models; `keep` says how long one is to stay loaded."""
    return [
        *Responses(gateway, accounts, api_of).routes(),
        *Messages(gateway, accounts, api_of).routes(),
        *Ollama(gateway, accounts, api_of, look, keep).routes(),
        *Tgi(gateway, accounts, api_of).routes(),
    ]
