"""Metrics as Prometheus takes them: a clean exposition, a real server that scrapes, a dashboard with data, alerts that fire."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conformance.servers import HOST, free_port, until
from tests.integration.daemon import Daemon, model, running

MONITORING = Path(__file__).parents[2] / "config/monitoring"
HERE = {"__rate_interval": "1m", "instance": ".*", "model": ".*"}
NEEDS_A_GPU = ("offloadd_device_utilization_ratio", "offloadd_device_temperature_celsius")
WITHIN_S = 60.0


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Two models of which one fits, and one whose server comes back after its death: something of everything has happened."""
    models = {name: model(run="on-demand", idle_timeout="1h", restart={"backoff": "100ms"}) for name in ("a", "b")}
    with running(tmp_path_factory.mktemp("metrics"), models, budget={"host": {"limit": "100MiB"}}) as found:
        happen(found)
        yield found


def happen(daemon: Daemon) -> None:
    """Loads, an eviction, a crash and a restart, answers, refusals and a reload that is refused."""
    assert daemon.chat("a").status == 200
    assert daemon.chat("b").status == 200
    os.kill(daemon.pid("b"), signal.SIGKILL)
    until(lambda: daemon.chat("b").status == 200, "b is back")
    daemon.events("b", 20)
    assert daemon.chat("nobody").status == 404
    good = daemon.config_path.read_text()
    daemon.config_path.write_text("{}x")
    assert daemon.post("/reload", None).status == 400
    daemon.config_path.write_text(good)
    assert daemon.post("/reload", None).status == 200


def names_of(exposition: str) -> set[str]:
    return {line.split("{")[0].split(" ")[0] for line in exposition.splitlines() if line and not line.startswith("#")}


def test_the_exposition_is_clean(daemon: Daemon) -> None:
    text = daemon.request("GET", "/metrics").body
    assert all(name.startswith("offloadd_") for name in names_of(text.decode()))
    result = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=WITHIN_S, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, b"")


def test_the_files_are_what_prometheus_takes() -> None:
    for kind, name in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        command = [tool("promtool"), "check", kind, str(MONITORING / name)]
        subprocess.run(command, capture_output=True, timeout=WITHIN_S, check=True)


def test_alerts_fire_and_say_what_to_do(tmp_path: Path) -> None:
    """Prometheus' own test of rules: series that go wrong, and the alert that each earns."""
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(WRONG)
    series = [{"series": name, "values": values} for found in WRONG.values() for name, values in found]
    cases = [{"eval_time": "30m", "alertname": name, "exp_alerts": [{"exp_labels": {}}]} for name in WRONG]
    test = {"rule_files": [str(MONITORING / "alerts.yaml")], "tests": [{"interval": "1m", "input_series": series}]}
    quiet = {**test, "tests": [{**test["tests"][0], "alert_rule_test": [{**case, "exp_alerts": []} for case in cases]}]}
    (tmp_path / "quiet.yaml").write_text(yaml.safe_dump(quiet))
    command = [tool("promtool"), "test", "rules", str(tmp_path / "quiet.yaml")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    fired = set(re.findall(r"alertname: (\w+)", said.stderr + said.stdout))
    assert fired == set(WRONG), said


WRONG = {
    "OffloaddDown": [('up{job="offloadd"}', "0x60")],
    "OffloaddSchedulerStuck": [("offloadd_scheduler_alive", "0x60")],
    "OffloaddInternalError": [("offloadd_internal_errors_total", "0x20 1x40")],
    "OffloaddConfigRefused": [("offloadd_config_last_reload_success", "0x60")],
    "OffloaddModelFailed": [('offloadd_model_state{model="a",state="failed"}', "1x60")],
    "OffloaddModelKeepsCrashing": [('offloadd_instance_restarts_total{model="a",reason="crashed"}', "0+1x60")],
    "OffloaddModelsPushOneAnotherOut": [('offloadd_instance_stops_total{model="a",reason="evicted"}', "0+1x60")],
    "OffloaddQueueLong": [('offloadd_model_oldest_wait_seconds{model="a"}', "0+60x60")],
    "OffloaddRequestsFail": [
        ('offloadd_proxy_errors_total{hop="backend",code="502"}', "0+1x60"),
        ('offloadd_requests_total{model="a"}', "0+10x60"),
    ],
    "OffloaddTakesMoreThanPromised": [
        ('offloadd_instance_measured_bytes{model="a"}', "120x60"),
        ('offloadd_instance_reserved_bytes{model="a"}', "100x60"),
    ],
    "OffloaddDeviceFull": [
        ('offloadd_device_free_bytes{device="x"}', "0x60"),
        ('offloadd_device_total_bytes{device="x"}', "100x60"),
    ],
}
"""Per alert: series that earn it."""


def test_queries_name_only_metrics_that_exist(daemon: Daemon) -> None:
    """Also where no Prometheus is at hand."""
    there = names_of(daemon.request("GET", "/metrics").body.decode())
    asked = {name for _, query in queries() for name in re.findall(r"offloadd_\w+", query)}
    assert asked - there <= set(NEEDS_A_GPU)


def queries() -> list[tuple[str, str]]:
    """Every query of the dashboard and of the alerts, with what it is for."""
    board = json.loads((MONITORING / "grafana.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel.get("targets", ())]
    notes = [("annotation", each["expr"]) for each in board["annotations"]["list"]]
    return [*panels, *notes, *((rule["alert"], rule["expr"]) for rule in rules)]


@pytest.fixture
def prometheus(daemon: Daemon, tmp_path: Path) -> Iterator[Callable[[str], list[Any]]]:
    """A real server that scrapes the daemon with the shipped files; asks it one query."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = "500ms"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"{HOST}:{daemon.port}"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    port = free_port()
    command = [tool("prometheus"), f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=log, cwd=tmp_path)
    try:
        yield lambda query: ask(port, query)
    finally:
        process.terminate()
        process.wait(WITHIN_S)
        print((tmp_path / "log").read_text())


def ask(port: int, query: str) -> list[Any]:
    """Its answer; nothing while it is not up yet."""
    url = f"http://{HOST}:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=WITHIN_S) as answer:
            return list(json.load(answer)["data"]["result"])
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except (ConnectionError, urllib.error.URLError):
        return []


def test_a_real_prometheus_finds_data_for_every_panel(daemon: Daemon, prometheus: Callable[[str], list[Any]]) -> None:
    until(lambda: prometheus('up{job="offloadd"} == 1'), "it is scraped", WITHIN_S)
    happen(daemon)
    missing = [(title, filled(query)) for title, query in queries() if not query.startswith(NEEDS_A_GPU)]
    alerts = {rule["alert"] for rule in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]}
    panels = [(title, query) for title, query in missing if title not in alerts and title != "annotation"]
    deadline = time.monotonic() + WITHIN_S
    while panels and time.monotonic() < deadline:
        panels = [(title, query) for title, query in panels if not prometheus(query)]
        daemon.chat("b")
    assert not panels
    for title, query in missing:
        assert isinstance(prometheus(query), list), title
    assert prometheus("offloadd_instance_stops_total{reason='evicted'}")[0]["metric"]["model"] == "a"


def filled(query: str) -> str:
    """The query as Grafana sends it, with everything chosen."""
    return re.sub(r"\$(\w+)", lambda found: HERE[found[1]], query)
