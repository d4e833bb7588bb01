"""HTTP probes of instances: one request on a connection of its own, bounded in time and size."""

from __future__ import annotations

import aiohttp

from offloadd.state.launch import Endpoint, Probe, ProbeReply

_MAX_BODY = 256 * 1024

CONNECT_TIMEOUT = 5.0


def open_session() -> aiohttp.ClientSession:
    """For probes: each on a connection of its own, so that an old one tells nothing."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


class Prober:
    """Sends probes. Each takes a new connection: a pooled one would say nothing about the listener."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, endpoint: Endpoint, probe: Probe) -> ProbeReply:
        """Never raises for what the instance does or does not answer."""
        timeout = aiohttp.ClientTimeout(total=probe.timeout)
        try:
            method, headers = ("POST", {"Content-Type": "application/json"}) if probe.body else ("GET", {})
            headers = {**headers, **endpoint.headers}
            url = endpoint.url + endpoint.at(probe.path)
            async with self._session.request(
                method, url, data=probe.body or None, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                body = b""
                while len(body) < _MAX_BODY and (chunk := await answer.content.read(_MAX_BODY - len(body))):
                    body += chunk
                return ProbeReply(status=answer.status, body=body)
        except TimeoutError:
            return ProbeReply(status=None, error=f"no answer within {probe.timeout:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return ProbeReply(status=None, error=str(error) or type(error).__name__)
