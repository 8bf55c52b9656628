"""Dashboards and alerts name only metrics and labels that exist; Prometheus's own tools take the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="PyYAML reads the rules")

from tests.support.dashboards import DEPLOY, Query, alert_queries, labels_of, metrics_of, panel_queries
from ts_handlers.monitoring.catalogue import FAMILIES

QUERIES = [*panel_queries(), *alert_queries()]
OF_TORCHSERVE = {
    *("ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"),
    *("Requests2XX", "Requests4XX", "CPUUtilization", "MemoryUtilization", "GPUUtilization", "GPUMemoryUsed"),
}
"""TorchServe's own, of its ``configs/metrics.yaml``."""
OF_PROMETHEUS = {"job", "instance", "le"}


def ours() -> dict[str, set[str]]:
    """Labels by name, each name as Prometheus stores it."""
    found = {}
    for family in FAMILIES:
        endings = ("_bucket", "_sum", "_count") if family.type == "histogram" else ("",)
        found.update({family.full_name + ending: set(family.labels) for ending in endings})
    return found


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_names_what_exists(query: Query) -> None:
    known = ours()
    names = metrics_of(query.expression)
    assert names, query.expression
    assert names <= known.keys() | OF_TORCHSERVE
    labels = set().union(*(known[name] for name in names if name in known))
    if names & OF_TORCHSERVE:
        labels |= {"model_name"}
    assert labels_of(query.expression) <= labels | OF_PROMETHEUS


def test_a_wrong_name_is_found() -> None:
    assert metrics_of('sum by (le, m) (rate(a_bucket{x="y"}[5m])) / b > 2 and c') == {"a_bucket", "b", "c"}
    assert labels_of('sum by (le, m) (rate(a_bucket{x=~"y=z"}[5m])) / on (n) b') == {"le", "m", "x", "n"}


def test_torchserves_metrics_are_in_its_file() -> None:
    ts = pytest.importorskip("ts", reason="TorchServe is not installed")
    text = (Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text("utf-8")
    assert {name for name in OF_TORCHSERVE if name not in text} == set()


@pytest.mark.processes
def test_the_dashboards_are_what_the_script_writes() -> None:
    script = DEPLOY / "grafana" / "build_dashboards.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    import yaml

    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {query.where.removeprefix("alert ") for query in alert_queries()}
    assert (fires, silent) == (names, names)


def test_grafanas_library_takes_the_dashboards() -> None:
    """The classes of Grafana's own schema read each file, and know every field of it."""
    models = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="the package grafana-foundation-sdk is not installed"
    )
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        facts = json.loads(path.read_text("utf-8"))
        read = models.Dashboard.from_json(facts)
        assert (read.uid, len(read.panels)) == (facts["uid"], len(facts["panels"]))
        again = json.loads(json.dumps(read.to_json(), default=lambda part: part.to_json()))
        assert again.keys() >= facts.keys()
        for panel, found in zip(facts["panels"], again["panels"], strict=True):
            assert found.keys() >= panel.keys() - {"description"}
            assert [target["expr"] for target in found["targets"]] == [each["expr"] for each in panel["targets"]]


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments",
    [("test", "rules", "alerts_test.yml"), ("check", "rules", "alerts.yml"), ("check", "config", "prometheus.yml")],
    ids=" ".join,
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH and $PROMTOOL is not set; Debian's package prometheus has it")
    checked = subprocess.run(
        [promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
