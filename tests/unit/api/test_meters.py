"""What is counted: requests by how they ended, instances off the log's events, and never more names than a bound."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from offloadd.api.meters import MAX_NAMES, OTHERS, Meters
from offloadd.api.metrics import exposition
from offloadd.events import EventKind, about
from offloadd.state.ids import BackendName, ModelName
from offloadd.state.served import Fate, Served
from offloadd.units import Instant, Seconds

ANSWERED = Served(
    request="r",
    path="/v1/chat/completions",
    dialect="openai",
    fate=Fate.ANSWERED,
    status=200,
    arrived=Instant(0),
    duration=Seconds(3),
    waited=Seconds(0.1),
    first_byte=Seconds(0.2),
    model=ModelName("a"),
    backend=BackendName("llamacpp"),
    streamed=True,
    prompt_tokens=7,
    completion_tokens=50,
    tokens_per_second=20.0,
)
HERE = {"model": "a", "backend": "llamacpp"}


@pytest.fixture
def meters() -> Meters:
    return Meters()


@pytest.fixture
def log(meters: Meters) -> Iterator[logging.Logger]:
    found = logging.getLogger("offloadd.test_meters")
    found.setLevel(logging.INFO)
    found.addHandler(meters.handler)
    yield found
    found.removeHandler(meters.handler)


def value(meters: Meters, name: str, **labels: str) -> float | None:
    return meters.registry.get_sample_value(f"offloadd_{name}", labels)


def test_a_request_that_was_answered(meters: Meters) -> None:
    meters.served(ANSWERED)
    assert value(meters, "requests_total", model="a", path="/v1/chat/completions", fate="answered", code="200") == 1
    assert value(meters, "tokens_total", **HERE, kind="prompt") == 7
    assert value(meters, "tokens_total", **HERE, kind="completion") == 50
    assert value(meters, "tokens_total", **HERE, kind="cached") is None
    assert value(meters, "request_wait_seconds_sum", model="a") == pytest.approx(0.1)
    assert value(meters, "request_first_token_seconds_sum", **HERE) == pytest.approx(0.2)
    assert value(meters, "request_inter_token_seconds_sum", **HERE) == pytest.approx(0.05)
    assert value(meters, "request_duration_seconds_sum", model="a") == 3


def test_an_answer_that_comes_whole_has_no_first_token(meters: Meters) -> None:
    meters.served(replace(ANSWERED, streamed=False))
    assert value(meters, "request_first_token_seconds_count", **HERE) is None


def test_requests_that_were_not_are_counted_by_hop(meters: Meters) -> None:
    nothing = replace(ANSWERED, waited=None, first_byte=None, tokens_per_second=None, prompt_tokens=None, completion_tokens=None)
    for fate, status, hop in ((Fate.REFUSED, 429, "offloadd"), (Fate.FAILED, 502, "backend"), (Fate.CANCELLED, 499, "client")):
        meters.served(replace(nothing, fate=fate, status=status))
        assert value(meters, "proxy_errors_total", hop=hop, code=str(status)) == 1
    meters.served(replace(nothing, fate=Fate.REFUSED, status=404, model=None, backend=None))
    assert value(meters, "requests_total", model="", path="/v1/chat/completions", fate="refused", code="404") == 1
    assert value(meters, "request_wait_seconds_count", model="a") is None


def test_names_are_bounded(meters: Meters) -> None:
    for number in range(MAX_NAMES + 50):
        meters.served(replace(ANSWERED, model=ModelName(f"m{number}")))
    meters.served(ANSWERED)
    assert value(meters, "request_duration_seconds_count", model="m0") == 1
    assert value(meters, "request_duration_seconds_count", model=OTHERS) == 52
    text = exposition(meters)[0].decode()
    assert sum(line.startswith("offloadd_request_duration_seconds_count") for line in text.splitlines()) == MAX_NAMES


def test_an_instance_from_launch_to_restart(meters: Meters, log: logging.Logger) -> None:
    log.info("1", extra=about(EventKind.INSTANCE_SPAWNED, **HERE))
    log.info("2", extra=about(EventKind.INSTANCE_READY, **HERE, load_s=4.0))
    log.warning("3", extra=about(EventKind.INSTANCE_ENDED, **HERE, cause="crashed", expected=False))
    log.info("4", extra=about(EventKind.INSTANCE_SPAWNED, **HERE))
    log.info("5", extra=about(EventKind.INSTANCE_STOPPING, model="a", reason="evicted"))
    log.info("6", extra=about(EventKind.INSTANCE_ENDED, **HERE, cause="stopped", expected=True))
    log.info("7", extra=about(EventKind.INSTANCE_SPAWNED, **HERE))
    assert value(meters, "instance_starts_total", **HERE) == 3
    assert value(meters, "instance_loads_total", **HERE) == 1
    assert value(meters, "instance_load_seconds_sum", **HERE) == 4
    assert value(meters, "instance_restarts_total", model="a", reason="crashed") == 1
    assert value(meters, "instance_stops_total", model="a", reason="evicted") == 1
    assert value(meters, "instance_ends_total", model="a", cause="stopped", expected="yes") == 1
    assert value(meters, "log_messages_total", level="warning") == 1


def test_reloads_bugs_and_plain_lines(meters: Meters, log: logging.Logger) -> None:
    log.info("plain %s", "line")
    log.error("1", extra=about(EventKind.CONFIG_REFUSED))
    log.error("2", extra=about(EventKind.INTERNAL_ERROR))
    assert value(meters, "config_reloads_total", outcome="refused") == 1
    assert value(meters, "config_reloads_total", outcome="applied") == 0
    assert value(meters, "internal_errors_total") == 1
    assert value(meters, "log_messages_total", level="error") == 2


def test_the_format_that_the_scraper_accepts(meters: Meters) -> None:
    assert exposition(meters)[1].startswith("text/plain")
    body, content_type = exposition(meters, "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
