"""A request whose engine was lost before the first byte of an answer goes to another: a replica, the next engine, or its successor.

Once, and never after the first byte. One that was alone on a process of ours that died may well be what ended it: it is given to no
other of the same engine, only to another program, and whoever sent it is told when there is none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable

from aiohttp import web

from offloadd.events import EventKind, about
from offloadd.proxy.account import ACCOUNT, Account
from offloadd.proxy.calls import BackendLostError
from offloadd.state.ids import BackendName, ModelName

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Engines = Callable[[ModelName], Collection[BackendName]]


def with_another_try(routes: Iterable[web.RouteDef], engines: Engines) -> list[web.RouteDef]:
    """The same routes; their handlers are called a second time when an engine was lost under the first call.

    `engines` are those that may serve a model. Only inference is repeated: what is asked for by path may have done something that
    must not be done twice.
    """
    return [_repeated(route, engines) if route.method == "POST" else route for route in routes]


def check_other(account: Account, granted: BackendName) -> None:
    """The first failure once more, when the second try would be with the engine that the request may have killed."""
    lost = account.lost
    if isinstance(lost, BackendLostError) and lost.suspect and lost.backend == granted:
        raise lost


def _repeated(route: web.RouteDef, engines: Engines) -> web.RouteDef:
    first: Handler = route.handler

    @functools.wraps(first)
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await first(request)
        except BackendLostError as lost:
            account = request.get(ACCOUNT)
            if request.transport is None or account is None or account.moved:
                raise
            if lost.suspect and not set(engines(lost.instance.model)) - {lost.backend}:
                raise
            account.moved = True
            account.lost = lost
            log.info("%s; trying another", lost.message, extra=about(EventKind.REQUEST_MOVED, instance=lost.instance))
        return await first(request)

    return web.RouteDef(route.method, route.path, handle, route.kwargs)
