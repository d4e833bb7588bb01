"""Engines that a config describes: what is filled in, what is asked, and what stays secret."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offloadd.backends import discover
from offloadd.backends.base import NOWHERE, backend_of, fingerprint
from offloadd.backends.custom import BACKEND as CUSTOM
from offloadd.backends.external import BACKEND as EXTERNAL
from offloadd.backends.external import endpoint_of
from offloadd.state.desired import BackendKind, Engine, ModelSpec, ReadyRule
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.launch import Endpoint, Health, ModelFacts, ProbeReply, SourceNeed
from offloadd.units import Bytes

OWN = Engine(
    name=BackendName("own"),
    adapter="custom",
    kind=BackendKind.CUSTOM,
    command=("podman", "run", "--name", "m-${port}", "image", "--model=${source}", "--name=${model}"),
    args=("--port", "${port}"),
    env={"WHERE": "${source}"},
    stop_command=("podman", "stop", "m-${port}"),
    ready=ReadyRule(path="/up", status=204),
)
CLOUD = Engine(
    name=BackendName("cloud"), adapter="external", kind=BackendKind.EXTERNAL, url="https://h.example/x/v1", key="sk-secret"
)
FACTS = ModelFacts(path="/models/a b.bin", size=Bytes(2**30), identity="1")
AT = Endpoint(host="127.0.0.1", port=41000)


def spec(**fields: object) -> ModelSpec:
    base = {"name": ModelName("m"), "source": "a b.bin", "backends": (OWN.name, CLOUD.name)}
    return ModelSpec(**base | fields)  # type: ignore[arg-type]


def test_the_words_of_a_custom_command_are_filled_in_wherever_they_stand() -> None:
    launch = CUSTOM.bound(OWN).launch(OWN, spec(args=("--x", "${model}")), FACTS, NOWHERE, AT)
    assert launch.argv[3] == "m-41000"
    assert launch.argv[5:] == ("--model=/models/a b.bin", "--name=m", "--port", "41000", "--x", "m")
    assert launch.env["WHERE"] == "/models/a b.bin"


def test_the_configs_own_check_says_when_it_is_ready() -> None:
    own = CUSTOM.bound(OWN)
    (probe,) = own.probes(spec()).readiness
    assert probe.path == "/up"
    readings = [own.read_probe(spec(), "/up", ProbeReply(status=status)) for status in (None, 503, 200, 204)]
    assert readings == [Health.SILENT, Health.LOADING, Health.SILENT, Health.READY]


def test_only_a_command_that_asks_for_the_source_needs_it() -> None:
    assert CUSTOM.bound(OWN).source_need("x") is SourceNeed.DISK_OR_HUB
    assert CUSTOM.bound(replace(OWN, command=("run",))).source_need("x") is SourceNeed.NOTHING
    assert EXTERNAL.source_need("x") is SourceNeed.NOTHING


def test_memory_is_the_configs_word_or_the_files_size_or_unknown() -> None:
    own = CUSTOM.bound(OWN)
    assert own.estimate(spec(vram=Bytes(5)), FACTS).total == 5  # type: ignore[union-attr]
    assert own.estimate(spec(), FACTS).total > FACTS.size  # type: ignore[union-attr, operator]
    assert own.estimate(spec(), ModelFacts(size=Bytes(0))) is None


def test_each_engine_of_a_config_has_its_own_adapter() -> None:
    backends = discover()
    own, cloud = backend_of(backends, OWN), backend_of(backends, CLOUD)
    assert own is not None
    assert cloud is not None
    assert (own.api(spec()).model, cloud.api(spec()).model) == ("m", "m")
    named = spec(sources={CLOUD.name: "gpt-x"})
    assert cloud.api(named).model == "gpt-x"
    assert own.api(named).model == "m"
    assert backend_of(backends, None) is None


@pytest.mark.parametrize(
    ("url", "at", "path"),
    [
        ("https://h.example/v1", "https://h.example", "/v1/chat/completions"),
        ("https://h.example:8443/openai/v2/", "https://h.example:8443", "/openai/v2/chat/completions"),
        ("http://h.example", "http://h.example:80", "/v1/chat/completions"),
        ("http://127.0.0.1:9000/", "http://127.0.0.1:9000", "/v1/chat/completions"),
        ("http://[::1]:9000/v1", "http://[::1]:9000", "/v1/chat/completions"),
    ],
)
def test_the_base_path_of_a_url_is_respected(url: str, at: str, path: str) -> None:
    endpoint = endpoint_of(replace(CLOUD, url=url))
    assert endpoint.url == at
    assert endpoint.at("/v1/chat/completions") == path


def test_other_paths_lie_beside_the_api() -> None:
    endpoint = endpoint_of(replace(CLOUD, url="https://h/llm/v1"))
    assert endpoint.at("/health") == "/llm/health"
    assert endpoint.at("/v1/models?x=1") == "/llm/v1/models?x=1"
    assert AT.at("/v1/models") == "/v1/models"
    assert AT.at("/slots") == "/slots"


def test_a_key_is_sent_and_never_shown() -> None:
    endpoint = endpoint_of(CLOUD)
    assert endpoint.headers == {"Authorization": "Bearer sk-secret"}
    launch = EXTERNAL.bound(CLOUD).launch(CLOUD, spec(), FACTS, NOWHERE, AT)
    for shown in (endpoint, CLOUD, EXTERNAL.bound(CLOUD), launch):
        assert "sk-secret" not in repr(shown)


def test_another_url_key_or_name_makes_an_instance_stale_and_memory_settings_do_not() -> None:
    def mark(engine: Engine, **fields: object) -> str:
        return fingerprint(EXTERNAL.bound(engine), engine, spec(**fields), ModelFacts())

    assert mark(CLOUD) == mark(CLOUD, vram=Bytes(5), devices="cpu", context=1)
    assert mark(CLOUD) != mark(replace(CLOUD, url="https://other/v1"))
    assert mark(CLOUD) != mark(replace(CLOUD, key="sk-other"))
    assert mark(CLOUD) != mark(CLOUD, sources={CLOUD.name: "gpt-x"})


@pytest.mark.parametrize(
    ("status", "health"),
    [(None, Health.SILENT), (200, Health.READY), (404, Health.READY), (401, Health.SILENT), (502, Health.SILENT)],
)
def test_an_external_engine_is_there_when_it_answers_and_takes_our_key(status: int | None, health: Health) -> None:
    assert EXTERNAL.read_probe(spec(), "/v1/models", ProbeReply(status=status)) is health
