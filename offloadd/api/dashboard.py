"""`GET /ui`: one page that shows what runs, in which memory and why. It holds all that it needs and asks this server only."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from aiohttp import web

_FOLDER = resources.files("offloadd.api") / "page"
_STYLE, _SCRIPT, _PAGE = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js", "page.html"))


def _only(text: str) -> str:
    """The one inline text that the browser may use."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = _PAGE.replace("{style}", _STYLE).replace("{script}", _SCRIPT)
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_only(_SCRIPT)}; style-src {_only(_STYLE)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def dashboard_route() -> web.RouteDef:
    """The route. The page is open; what it shows is asked for with the key that its reader gives it."""

    async def dashboard(_: web.Request) -> web.Response:
        return web.Response(text=PAGE, headers=HEADERS)

    return web.get("/ui", dashboard)
