"""A request whose engine was lost before the first byte of an answer goes to another: a replica, the next engine, or its successor.

Once, and never after the first byte. One that was alone on a process of ours that died is not given to the next: it may well be
what ended it, and whoever sent it is told.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from offloadd.events import EventKind, about
from offloadd.proxy.account import ACCOUNT
from offloadd.proxy.relay import BackendLostError

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOST: web.RequestKey[str] = web.RequestKey("lost", str)
"""Why a first try came to nothing; for the reason that the answer gives."""


def with_another_try(routes: Iterable[web.RouteDef]) -> list[web.RouteDef]:
    """The same routes; their handlers are called a second time when an engine was lost under the first call.

    Only inference is repeated. What is asked for by path may have done something that must not be done twice.
    """
    return [_repeated(route) if route.method == "POST" else route for route in routes]


def _repeated(route: web.RouteDef) -> web.RouteDef:
    first: Handler = route.handler

    @functools.wraps(first)
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await first(request)
        except BackendLostError as lost:
            account = request.get(ACCOUNT)
            if request.transport is None or account is None or account.moved or lost.suspect:
                raise
            account.moved = True
            request[LOST] = lost.message
            log.info("%s; trying another", lost.message, extra=about(EventKind.REQUEST_MOVED, instance=lost.instance))
        return await first(request)

    return web.RouteDef(route.method, route.path, handle, route.kwargs)
