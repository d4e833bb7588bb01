"""The real llama-server outlives the daemon: killed and begun anew, or replaced in place, it serves on with the same processes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.conformance.servers import until
from tests.e2e.conftest import Real
from tests.integration.daemon import again, alive, launch, running, supervised, wait_healthy


def test_kill_9_with_two_models_ready_and_streams_running(real: Real, tmp_path: Path) -> None:
    models = {"a": real.model(), "b": real.model()}
    first = launch(tmp_path, models, llamacpp=real.llamacpp)
    try:
        wait_healthy(first)
        old = {name: first.pid(name) for name in models}
        with first.stream("a", 400, ignore_eos=True) as one, first.stream("b", 400, ignore_eos=True) as other:
            one.skip(3)
            other.skip(3)
            first.signal(signal.SIGKILL)
            first.exit()
            for stream in (one, other):
                assert "[DONE]" not in list(stream)
        begin = time.monotonic()
        second = again(tmp_path, first.config_path, first.base)
        with supervised(second):
            for name in models:
                reply = second.chat(name, 1)
                assert (reply.status, reply.headers["X-Offloadd-Instance"]) == (200, f"{name}-1")
            print(f"both serve {time.monotonic() - begin:.2f} s after the new daemon's start")
            assert {name: second.pid(name) for name in models} == old
            assert [second.launches(name) for name in models] == [1, 1]
        assert not any(alive(pid) for pid in old.values())
    finally:
        first.discard()


def test_a_newer_program_in_place_under_a_stream(real: Real, tmp_path: Path) -> None:
    with running(tmp_path, {"a": real.model()}, llamacpp=real.llamacpp) as daemon:
        old = daemon.pid()
        with daemon.stream("a", 100, ignore_eos=True) as stream:
            stream.skip(2)
            daemon.signal(signal.SIGUSR2)
            assert list(stream)[-1] == "[DONE]"
        until(lambda: daemon.log.count(" started") == 2, "the new program runs", 30)
        assert daemon.chat("a", 2).status == 200
        assert daemon.pid() == old
        assert daemon.launches() == 1


def test_a_canary_asks_the_real_server_for_one_token(real: Real, tmp_path: Path) -> None:
    patches = {"offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.2}
    models = {"a": real.model(health={"canary": "200ms"})}
    with running(tmp_path, models, llamacpp=real.llamacpp, patches=patches) as daemon:
        pid = daemon.pid()

        def predicted() -> float:
            time.sleep(1.5)  # whoever asks shows that it lives, and a canary waits for silence
            lines = daemon.request("GET", "/upstream/a/metrics").body.decode().splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith("llamacpp:tokens_predicted_total "))

        until(lambda: predicted() >= 2, "two canaries were answered")
        assert daemon.pid() == pid
        assert not daemon.look()["instances"][0]["fault"]
