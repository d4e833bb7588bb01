"""One config with every kind of engine: each answers, is told apart, fails, and is replaced or passed over."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import openai
import psutil
import pytest
import text_generation

from tests.conformance.processes import until
from tests.integration.daemon import Daemon, alive, running
from tests.integration.engines import KEY, Elsewhere, daemon_of, elsewhere, engines, script, served_by

ENGINES = ("llamacpp", "vllm", "tgi", "own", "odd", "cloud")


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    with elsewhere(tmp_path_factory.mktemp("away"), TOKEN_S=0.005) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, away: Elsewhere) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("engines")
    models = {f"on-{name}": served_by(name, aliases=[f"alias/{name}"]) for name in ENGINES}
    with daemon_of(folder, models, away.entry) as found:
        yield found


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_answers_whole_and_streaming_and_says_who_it_was(daemon: Daemon, name: str) -> None:
    reply = daemon.chat(f"on-{name}")
    assert reply.status == 200, reply.body
    assert reply.headers["X-Offloadd-Backend"] == name
    assert reply.headers["X-Offloadd-Reason"]
    assert reply.json()["choices"][0]["message"]["content"] == "the night was calm"
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    events = daemon.events(f"on-{name}", tokens=4)
    assert events[-1] == "[DONE]"
    said = "".join(choice["delta"].get("content") or "" for event in events[:-1] for choice in event["choices"])
    assert said == "the night was calm"


@pytest.mark.parametrize("name", ENGINES)
def test_an_alias_reaches_engines_that_insist_on_their_own_name(daemon: Daemon, name: str) -> None:
    assert daemon.chat(f"alias/{name}").status == 200


@pytest.mark.parametrize("name", ENGINES)
def test_the_openai_client_is_served_by_all(daemon: Daemon, name: str) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key="none") as client:
        whole = client.chat.completions.create(model=f"on-{name}", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        assert whole.choices[0].message.content == "the night was"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        stream = client.chat.completions.create(
            model=f"on-{name}", messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == "the night was"


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.parametrize("name", ENGINES)
def test_tgi_clients_are_served_by_all(daemon: Daemon, name: str) -> None:
    url = f"http://127.0.0.1:{daemon.port}/tgi/on-{name}"
    client = text_generation.Client(url)
    assert client.generate("My name is", max_new_tokens=3).generated_text == "the night was"
    events = list(client.generate_stream("My name is", max_new_tokens=3))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == "the night was"
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "length"
    hub = huggingface_hub.InferenceClient(url)
    assert hub.text_generation("My name is", max_new_tokens=3) == "the night was"
    assert "".join(hub.text_generation("My name is", max_new_tokens=3, stream=True)) == "the night was"


def test_oddities_of_tgi_do_not_reach_clients(daemon: Daemon) -> None:
    """Its own word for a stop sequence, empty ids, its own name for the model."""
    whole = daemon.chat("on-tgi", tokens=9, stop=["night"]).json()
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["id"]
    assert whole["model"] == "on-tgi"
    events = daemon.events("on-tgi", tokens=9, stop=["night"])
    assert [event["choices"][0]["finish_reason"] for event in events[:-1] if event["choices"]][-1] == "stop"
    assert all(event["id"] and event["model"] == "on-tgi" for event in events[:-1])
    refused = daemon.chat("on-tgi", tokens=100_000)
    assert refused.status == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_the_key_of_an_external_engine_is_nowhere_to_be_seen(daemon: Daemon) -> None:
    daemon.chat("on-cloud")
    for path in ("/config", "/backends", "/models", "/models/on-cloud", "/health", "/vram/status"):
        assert KEY not in daemon.request("GET", path).body.decode()
    assert KEY not in daemon.log
    assert not any(KEY.encode() in path.read_bytes() for path in daemon.data_dir.rglob("*") if path.is_file())


def test_an_external_engine_takes_no_memory_and_has_no_process(daemon: Daemon) -> None:
    daemon.chat("on-cloud")
    (instance,) = daemon.look("on-cloud")["instances"]
    assert instance["pid"] is None
    devices = daemon.get("/vram/status")["devices"]
    assert not any(held["model"] == "on-cloud" for each in devices for held in each["instances"])


def test_secrets_of_a_launch_are_not_on_its_command_line(daemon: Daemon) -> None:
    daemon.chat("on-vllm")
    process = psutil.Process(daemon.pid("on-vllm"))
    key = process.environ()["VLLM_API_KEY"]
    assert key not in " ".join(process.cmdline())
    assert len(key) == 64


@pytest.mark.parametrize("name", ["llamacpp", "vllm", "tgi"])
def test_a_request_as_large_as_one_with_pictures_is_taken(daemon: Daemon, name: str) -> None:
    """TGI by itself takes 2 MB."""
    assert daemon.chat(f"on-{name}", user="x" * 3_000_000).status == 200


# --- each is killed ---


def tree(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]


@pytest.mark.parametrize("name", ["llamacpp", "vllm", "tgi", "own", "odd"])
def test_one_that_is_killed_is_replaced_with_nothing_left_of_it(daemon: Daemon, name: str) -> None:
    daemon.chat(f"on-{name}")
    old = tree(daemon.pid(f"on-{name}"))
    assert len(old) == {"vllm": 3, "tgi": 3}.get(name, 1)
    old[0].kill()
    until(lambda: not any(alive(each.pid) for each in old), "all of its processes are gone")
    assert daemon.chat(f"on-{name}").status == 200
    assert daemon.pid(f"on-{name}") != old[0].pid


@pytest.mark.parametrize("name", ["vllm", "tgi"])
def test_a_part_that_dies_takes_the_whole_along_and_is_named(daemon: Daemon, name: str) -> None:
    daemon.chat(f"on-{name}")
    old = tree(daemon.pid(f"on-{name}"))
    old[1].kill()
    until(lambda: not any(alive(each.pid) for each in old), "all of its processes are gone")
    assert daemon.chat(f"on-{name}").status == 200
    assert ("its engine process died" if name == "vllm" else "died, and with it the whole") in daemon.log


def test_one_whose_engine_is_stuck_is_found_out(tmp_path: Path) -> None:
    patches = {"offloadd.plan.upkeep.IDLE_SILENCE": 4.0, "offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.5}
    stuck = served_by("vllm", run="always", env={"STANDIN_HANG_AFTER_READY": "3"})
    with daemon_of(tmp_path, {"a": stuck}, patches=patches) as daemon:
        first = daemon.pid()
        assert daemon.request("GET", "/upstream/a/health").status == 200
        until(lambda: not alive(first), "it is replaced", 40)
        until(lambda: daemon.pids() not in ([], [first]), "another is started", 20)


# --- chosen ---


def test_a_request_may_name_its_engine_which_is_started_beside_the_other(tmp_path: Path) -> None:
    with daemon_of(tmp_path, {"a": served_by("llamacpp", "vllm")}) as daemon:
        assert daemon.chat().headers["X-Offloadd-Backend"] == "llamacpp"
        first = daemon.pid()
        assert daemon.chat(backend="vllm").headers["X-Offloadd-Backend"] == "vllm"
        assert daemon.chat(backend="llamacpp").headers["X-Offloadd-Backend"] == "llamacpp"
        assert alive(first)
        assert daemon.chat(backend="tgi").status == 400
        assert daemon.events(tokens=3, backend="vllm")[-1] == "[DONE]"


def test_a_request_whose_engine_dies_under_it_goes_to_the_next(tmp_path: Path, away: Elsewhere) -> None:
    # Every launch of the first engine dies of the first request that it gets, before a byte of an answer.
    fragile = served_by("llamacpp", "cloud", env={"STANDIN_CRASH_ON_REQUEST": "1"}, restart={"backoff": "30s"})
    with daemon_of(tmp_path, {"a": fragile}, away.entry) as daemon:
        reply = daemon.chat()
        assert (reply.status, reply.headers["X-Offloadd-Backend"]) == (200, "cloud")
        assert "before, the backend a-1 (llamacpp) was lost" in reply.headers["X-Offloadd-Reason"]
        assert "a-1 (llamacpp) was lost" in daemon.log


# --- and passed over ---


def test_an_engine_that_cannot_start_is_passed_over(tmp_path: Path, away: Elsewhere) -> None:
    broken = served_by("llamacpp", "cloud", env={"STANDIN_CRASH_WHILE_LOADING": "3"})
    with daemon_of(tmp_path, {"a": broken}, away.entry) as daemon:
        reply = daemon.chat()
        assert (reply.status, reply.headers["X-Offloadd-Backend"]) == (200, "cloud")


def test_an_external_engine_that_is_not_there_is_passed_over_and_taken_up_again(tmp_path: Path) -> None:
    with elsewhere(tmp_path) as away:
        port, entry = away.server.port, away.entry
    both = served_by("cloud", "llamacpp", restart={"backoff": "200ms", "max_backoff": "500ms", "give_up_after": 1000})
    with daemon_of(tmp_path, {"a": both}, entry) as daemon:
        assert daemon.chat().headers["X-Offloadd-Backend"] == "llamacpp"
        assert f"http://127.0.0.1:{port} does not answer" in daemon.log
        assert daemon.look()["state"] == "ready"


def test_an_external_engine_that_dies_is_replaced_by_the_next(tmp_path: Path) -> None:
    patches = {"offloadd.runtime.instances.checks.LIVENESS_EVERY": 0.3}
    with (
        elsewhere(tmp_path) as away,
        daemon_of(tmp_path, {"a": served_by("cloud", "llamacpp")}, away.entry, patches=patches) as daemon,
    ):
        assert daemon.chat().headers["X-Offloadd-Backend"] == "cloud"
        os.killpg(away.server.process.pid, signal.SIGKILL)
        reply = until(lambda: found if (found := daemon.chat()).status == 200 else None, "the next one serves", 30)
        assert reply.headers["X-Offloadd-Backend"] == "llamacpp"


def test_a_wrong_key_is_named(tmp_path: Path, away: Elsewhere) -> None:
    wrong = {**away.entry, "key": "sk-wrong"}
    with daemon_of(tmp_path, {"a": served_by("cloud", restart={"give_up_after": 1})}, wrong) as daemon:
        reply = daemon.chat()
        assert reply.status == 503
        assert "refuses our key" in reply.json()["error"]["message"]
        assert "sk-wrong" not in daemon.log + reply.body.decode()


# --- wrapped commands ---


def test_a_server_that_signals_do_not_reach_is_ended_by_its_stop_command(tmp_path: Path) -> None:
    """As a container's client does it: the command starts the server in a session of its own, without our mark, and waits."""
    scripts = {
        "run-elsewhere": """\
            env -i PATH="$PATH" STANDIN_IGNORE_TERM=1 setsid "$@" &
            echo $! > $FOLDER/pid-$TEST_PORT
            trap "" TERM
            wait
        """,
        "stop-elsewhere": "kill -9 $(cat $FOLDER/pid-$1)\n",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nFOLDER={tmp_path}\n{text}")
        (tmp_path / name).chmod(0o755)
    backends = engines()
    server = [*script("llama_server"), "-m", "${source}", "--port", "${port}", "--alias", "${model}"]
    backends["own"] |= {
        "command": [str(tmp_path / "run-elsewhere"), *server],
        "stop_command": [str(tmp_path / "stop-elsewhere"), "${port}"],
        "env": {"TEST_PORT": "${port}"},
    }
    wrapped = served_by("own", idle_timeout="500ms", stop_timeout="10s")
    with running(tmp_path, {"a": wrapped}, backends=backends) as daemon:
        assert daemon.chat().status == 200
        pid = int(next(tmp_path.glob("pid-*")).read_text())
        assert alive(pid)
        assert os.getsid(pid) != os.getsid(daemon.pids()[0])
        until(lambda: not alive(pid), "it is ended when it is idle", 30)
        until(lambda: daemon.state() == "off", "the model is off", 30)
        assert "killing its process tree" not in daemon.log


@pytest.mark.parametrize("how", ["lost", "hang"])
def test_a_vllm_that_takes_no_notice_of_the_end_while_it_loads_is_gone_all_the_same(tmp_path: Path, how: str) -> None:
    env = {"STANDIN_TERM_WHILE_LOADING": how, "STANDIN_LOAD_S": "32"}
    models = {"a": served_by("vllm", run="always", env=env, stop_timeout="1s")}
    with daemon_of(tmp_path, models) as daemon:
        old = until(lambda: found if len(found := tree(found_pid(daemon))) == 3 else None, "all of its processes load", 30)
        assert daemon.post("/models/a/unload?wait=1", None).status == 200
        assert not any(alive(each.pid) for each in old)
        # The second SIGTERM ends one that hangs.
        assert ("did not end within 1 s of SIGTERM (stop_timeout)" in daemon.log) is (how == "lost")


def found_pid(daemon: Daemon) -> int:
    return until(lambda: next(iter(daemon.pids()), None), "it is started", 30)


def test_a_wrapper_that_dies_has_its_server_ended_too(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    backends = engines()
    backends["own"]["stop_command"] = ["/bin/sh", "-c", f"echo ${{port}} >> {marks}"]
    with running(tmp_path, {"a": served_by("own", run="always")}, backends=backends) as daemon:
        os.kill(daemon.pid(), signal.SIGKILL)
        until(lambda: marks.exists() and marks.read_text(), "the stop command is run")
        assert daemon.chat().status == 200
