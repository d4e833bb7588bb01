"""The page: nothing from elsewhere, nothing that the browser may run but its own script, and only fields that the API has."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from offloadd.api import listing, views
from offloadd.api.dashboard import HEADERS, PAGE, dashboard_route
from offloadd.state.ids import LOCAL, DeviceId, DeviceKind
from offloadd.state.observed import DeviceView, ForeignProcess
from tests.unit.api.test_views import GPUS, on_gpu, picture
from tests.unit.plan.build import gib, offer, spec

SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
STYLE = PAGE.partition("<style>")[2].partition("</style>")[0]


async def test_it_is_served_with_its_guards() -> None:
    app = web.Application()
    app.add_routes([dashboard_route()])
    async with TestClient(TestServer(app)) as client:
        answer = await client.get("/ui")
        assert answer.status == 200
        assert await answer.text() == PAGE
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for text in (SCRIPT, STYLE):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert HEADERS["X-Frame-Options"] == "DENY"


def test_it_holds_all_that_it_needs_and_makes_no_markup() -> None:
    assert not re.search(r"https?://|<link|<img|<iframe|\bsrc=|@import|url\(", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\bon\w+=", PAGE)


def test_it_reads_only_what_the_api_has() -> None:
    model = spec("a")
    card = DeviceView(id=GPUS[0], kind=DeviceKind.NVIDIA, name="card", total=gib(24), free=gib(10), processes={})
    others = {DeviceId(LOCAL, GPUS[0].name): (ForeignProcess(pid=7, name="game", size=gib(1)),)}
    shown = picture(card, instances=(on_gpu("a-1", 6, 5),), model=model, offers=(offer(1),), foreign=others)
    device = views.vram_status(shown)["devices"][0]
    entry = listing.models(shown)["data"][0]
    known: dict[str, Any] = {
        "health": views.health(shown),
        "vram": views.vram_status(shown),
        "device": device,
        "entry": entry,
        "own": entry["offloadd"],
        "models": listing.models(shown),
        "each": {**device["instances"][0], **device["foreign"][0], **entry["offloadd"]["instances"][0], "what": "", "hint": ""},
    }
    for name, field in re.findall(r"\b(health|vram|device|entry|own|models|each)\.([a-z_]+)\b", SCRIPT):
        assert field in known[name], f"{name}.{field}"
