"""Engines are asked for their load only where that matters, each for a moment; what they do not tell is not known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from offloadd.backends import llamacpp, tgi, vllm
from offloadd.backends.base import TellsLoad
from offloadd.clock import SystemClock
from offloadd.runtime import signals
from offloadd.runtime.signals import Asked, Signals
from offloadd.state.desired import ModelSpec
from offloadd.state.ids import LOCAL, BackendName, InstanceId, ModelName
from offloadd.state.launch import Endpoint, EngineLoad, Probe, ProbeReply
from offloadd.units import Instant

SPEC = ModelSpec(name=ModelName("m"), source="m", backends=(BackendName("vllm"),))
ONE, TWO = InstanceId(LOCAL, ModelName("m"), 1), InstanceId(LOCAL, ModelName("m"), 2)


def metrics(running: float, waiting: float, cache: float = 0.25) -> bytes:
    labels = '{engine="0",model_name="m"}'
    rows = {"num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": cache}
    reasons = f'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} {waiting}\n'
    return (reasons + "".join(f"vllm:{name}{labels} {value}\n" for name, value in rows.items())).encode()


class Hands(SystemClock):
    """A clock that stands where it is put."""

    at = Instant(1000)

    def now(self) -> Instant:
        return self.at


def round_of(
    answers: Callable[[Endpoint, Probe], Awaitable[ProbeReply]],
    held: dict[InstanceId, int],
    backend: TellsLoad = vllm.BACKEND,
    *,
    clock: SystemClock | None = None,
    seen: list[bool] | None = None,
) -> Signals:
    """What is known after one round over two instances, on ports 1 and 2; `seen` is whether somebody looked on, by rounds."""
    asked = [Asked(instance=key, spec=SPEC, endpoint=Endpoint(host="h", port=key.number), backend=backend) for key in (ONE, TWO)]

    def choices(_held: Mapping[InstanceId, int], looked_on: bool) -> list[Asked]:
        if seen is not None:
            seen.append(looked_on)
        return asked

    made = Signals(clock=clock or SystemClock(), probe=answers, choices=choices, held=lambda: held)
    again(made)
    return made


def again(made: Signals) -> None:
    """One more round."""

    async def one_round() -> None:
        round_ = asyncio.create_task(made.attend())
        await asyncio.wait({round_}, timeout=0.2)  # it rests by then
        round_.cancel()
        with suppress(asyncio.CancelledError):
            await round_

    asyncio.run(one_round())


def test_what_is_beyond_our_own_requests_is_known() -> None:
    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        assert (probe.path, probe.timeout) == ("/metrics", signals.WITHIN)
        return ProbeReply(status=200, body=metrics(4, 3) if endpoint.port == 1 else metrics(0, 0))

    made = round_of(answer, {ONE: 2, TWO: 1})
    one, two = made.of(ONE), made.of(TWO)
    assert one is not None
    assert (one.beyond, one.running, one.waiting, one.cache) == (5, 4, 3, 0.25)
    assert two is not None
    assert two.beyond == 0  # one of ours that it has not begun yet is nobody's else


def test_what_was_said_long_ago_is_not_shown() -> None:
    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        return ProbeReply(status=200, body=metrics(1, 0))

    clock = Hands()
    made = round_of(answer, {ONE: 1}, clock=clock)
    assert set(made.told()) == {ONE, TWO}
    clock.at = Instant(clock.at + 60)
    assert made.told() == {}


def test_who_looks_has_them_asked_for_a_while() -> None:
    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        return ProbeReply(status=200, body=metrics(1, 0))

    clock, seen = Hands(), list[bool]()
    made = round_of(answer, {ONE: 1}, clock=clock, seen=seen)
    made.look()
    again(made)
    clock.at = Instant(clock.at + signals.LOOKED_ON + 1)
    again(made)
    assert seen == [False, True, False]


def test_who_does_not_tell_is_not_known_and_holds_up_nobody() -> None:
    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        if endpoint.port == 1:
            return ProbeReply(status=None, error="no answer within 1 s")
        return ProbeReply(status=200, body=metrics(1, 0))

    made = round_of(answer, {ONE: 1})
    assert made.of(ONE) is None
    assert made.of(TWO) is not None


def test_nobody_is_asked_while_nothing_runs() -> None:
    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        raise AssertionError(probe)

    assert round_of(answer, {}).of(ONE) is None


def test_our_request_that_ended_while_it_was_asked_is_not_a_strangers() -> None:
    held = {ONE: 1}

    async def answer(endpoint: Endpoint, probe: Probe) -> ProbeReply:
        held[ONE] = 0
        return ProbeReply(status=200, body=metrics(1, 0))

    one = round_of(answer, held).of(ONE)
    assert one is not None
    assert one.beyond == 0


def test_what_engines_say_is_read() -> None:
    def read(backend: TellsLoad, body: bytes, status: int | None = 200) -> EngineLoad | None:
        return backend.read_load(SPEC, ProbeReply(status=status, body=body))

    assert read(vllm.BACKEND, metrics(3, 2, 0.5)) == EngineLoad(running=3, waiting=2, cache=0.5)
    two = metrics(3, 2, 0.5) + b'vllm:num_requests_running{engine="1",model_name="a}b"} 4.0\n'
    assert read(vllm.BACKEND, two) == EngineLoad(running=7, waiting=2, cache=0.5)
    older = b"vllm:num_requests_running 1.0\nvllm:gpu_cache_usage_perc 0.75\n"
    assert read(vllm.BACKEND, older) == EngineLoad(running=1, waiting=0, cache=0.75)
    for body in (b"", b"# HELP vllm:num_requests_running\n", b"vllm:num_requests_running NaN\n", b"\xff\x00"):
        assert read(vllm.BACKEND, body) is None
    assert read(vllm.BACKEND, metrics(1, 1), 500) is None
    slots = b'[{"id":0,"is_processing":true},{"id":1,"is_processing":false},{"id":2,"is_processing":true}]'
    assert read(llamacpp.BACKEND, slots) == EngineLoad(running=2)
    for body in (b"{", b"[1]", b'{"error":1}', b"null"):
        assert read(llamacpp.BACKEND, body) is None
    assert read(llamacpp.BACKEND, slots, 501) is None
    begun = b"tgi_queue_size 2\ntgi_batch_current_size 3\ntgi_batch_current_max_tokens 500\ntgi_batch_max_total_tokens 2000\n"
    assert read(tgi.BACKEND, begun) == EngineLoad(running=3, waiting=2, cache=0.25)
    assert read(tgi.BACKEND, b"tgi_request_count 1\n") == EngineLoad(running=0)
    assert read(tgi.BACKEND, b"other 1\n") is None
