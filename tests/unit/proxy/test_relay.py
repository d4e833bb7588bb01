"""Work under a lease: ended when the lease is revoked, and none of its errors lost or left lying about."""

from __future__ import annotations

import asyncio
import gc

import aiohttp
import pytest

from offloadd.errors import RequestError
from offloadd.proxy.dialects import sse
from offloadd.proxy.leases import Host, Lease
from offloadd.proxy.relay import BackendLostError, until_revoked
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint
from offloadd.units import Seconds


@pytest.fixture
async def lease() -> Lease:
    host = Host(
        instance=InstanceId(LOCAL, ModelName("a"), 1),
        backend=BackendName("llamacpp"),
        endpoint=Endpoint(host="127.0.0.1", port=1),
        slots=1,
        sign=lambda: None,
    )
    return Lease(host=host, why="", waited=Seconds(0), revoked=asyncio.get_running_loop().create_future())


async def gives(value: int) -> int:
    return value


async def fails(error: Exception) -> None:
    raise error


async def test_work_that_ends(lease: Lease) -> None:
    assert await until_revoked(lease, gives(7)) == 7


async def test_work_that_is_revoked_is_cancelled(lease: Lease) -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    lease.revoked.set_result("it ended")
    with pytest.raises(BackendLostError, match=r"a-1 \(llamacpp\) was lost: it ended"):
        await until_revoked(lease, work())
    assert ended.is_set()


async def test_what_came_before_the_end_still_counts(lease: Lease) -> None:
    lease.revoked.set_result("it ended")
    assert await until_revoked(lease, gives(7)) == 7


@pytest.mark.parametrize("error", [aiohttp.ClientPayloadError("cut"), ConnectionResetError(), TimeoutError()])
async def test_a_broken_connection_is_a_lost_backend(lease: Lease, error: Exception) -> None:
    asyncio.get_running_loop().call_later(0.01, lease.revoked.set_result, "killed by SIGKILL")
    with pytest.raises(BackendLostError, match="killed by SIGKILL") as caught:
        await until_revoked(lease, fails(error))
    assert (caught.value.status, caught.value.code) == (502, "backend_lost")


async def test_an_answer_that_makes_no_sense(lease: Lease) -> None:
    with pytest.raises(RequestError) as caught:
        await until_revoked(lease, fails(sse.BrokenStreamError("an event is not a JSON object")))
    assert (caught.value.status, caught.value.code) == (502, "bad_answer")


async def test_a_client_that_leaves_as_the_work_fails(lease: Lease) -> None:
    """The error of the work is then nobody's; it must not turn up in the log as one that was never retrieved."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    fail = asyncio.Event()

    async def work() -> None:
        await fail.wait()
        raise ConnectionResetError

    handler = asyncio.create_task(until_revoked(lease, work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fail.set()
    await asyncio.sleep(0)
    handler.cancel()
    await asyncio.gather(handler, return_exceptions=True)
    assert handler.cancelled()
    del handler
    await asyncio.sleep(0)  # lets the loop forget it too
    gc.collect()
    assert not complaints
