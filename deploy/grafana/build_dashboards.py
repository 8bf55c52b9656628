"""Writes the two dashboards into `dashboards/`: ``python deploy/grafana/build_dashboards.py``.

`--check` writes nothing and ends with 1 if the files are not what this script would write. It needs nothing but Python.
The format is Grafana's classic dashboard model (schema version 39: Grafana 10 and later).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS, THEIRS = 'model=~"$model"', 'model_name=~"$model"'
RATE, RANGE = "[$__rate_interval]", "[$__range]"
WIDTH, HEIGHT = 8, 8

Target = tuple[str, str]
"""A query, and the name of its series."""


def panel(title: str, unit: str, *targets: Target, kind: str = "timeseries", **options: Any) -> dict[str, Any]:
    """A panel; `options` are ``stacked``, ``instant``, and ``text``, which says what the panel shows."""
    stacked, instant = options.pop("stacked", False), options.pop("instant", kind != "timeseries")
    custom = {"stacking": {"mode": "normal"}, "fillOpacity": 60, "drawStyle": "bars"} if stacked else {}
    made: dict[str, Any] = {
        "title": title,
        "description": options.pop("text", ""),
        "type": kind,
        "datasource": SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
                **({"format": "table"} if kind == "table" else {}),
            }
            for index, (expression, legend) in enumerate(targets)
        ],
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
    }
    assert not options, options
    return made


def quantiles(metric: str, by: str, names: str) -> list[Target]:
    """Queries of three quantiles of a histogram over time."""
    inside = f"sum by (le, {by}) (rate({metric}_bucket{{{OURS}}}{RATE}))"
    return [(f"histogram_quantile({share}, {inside})", f"{names} p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def total(metric: str, by: str, matchers: str = OURS, window: str = RANGE, how: str = "increase") -> str:
    """How much a counter has grown."""
    return f"sum by ({by}) ({how}({metric}{{{matchers}}}{window}))"


def of_torchserve(metric: str) -> str:
    """Mean seconds a request of one of TorchServe's counters of microseconds."""
    requests = total("ts_inference_requests_total", "model_name", THEIRS, RATE, "rate")
    return f"1e-6 * {total(metric, 'model_name', THEIRS, RATE, 'rate')} / {requests}"


def cold_starts() -> dict[str, Any]:
    """What happens before a model serves."""
    phase, start = "ts_handlers_start_phase_seconds", "ts_handlers_start_seconds"
    lookups = "ts_handlers_lookups_total"
    return dashboard(
        "ts-handlers-cold-starts",
        "ts-handlers: cold starts",
        [
            panel(
                *(
                    "Last start",
                    "s",
                    (f"max by (model, result) (ts_handlers_last_start_seconds{{{OURS}}})", "{{model}} {{result}}"),
                ),
                kind="stat",
                text="The slowest latest start among the workers.",
            ),
            panel(*("Model is served", "bool", (f"ts_handlers_model_ready{{{OURS}}}", "{{model}}")), kind="stat"),
            panel(
                "Workers by state",
                "short",
                (f"sum by (model, state) (ts_handlers_workers{{{OURS}}})", "{{model}} {{state}}"),
                stacked=True,
            ),
            panel(
                *("Phases of a start, mean", "s"),
                (
                    f"sum by (phase, result) ({phase}_sum{{{OURS}}}) / on (result) group_left () "
                    f"sum by (result) ({start}_count{{{OURS}}})",
                    "{{result}} {{phase}}",
                ),
                kind="barchart",
                text="How long a start of each result spent in each phase, over all recorded starts.",
            ),
            panel(
                *("Phases of a build, mean", "s"),
                (
                    f"sum by (backend, phase) (ts_handlers_build_phase_seconds_sum{{{OURS}}}) / "
                    f"sum by (backend, phase) (ts_handlers_build_phase_seconds_count{{{OURS}}})",
                    "{{backend}} {{phase}}",
                ),
                kind="barchart",
            ),
            panel(
                *("Duration of starts, median of all", "s"),
                (
                    f"histogram_quantile(0.5, sum by (le, model, result) ({start}_bucket{{{OURS}}}))",
                    "{{model}} {{result}}",
                ),
                kind="bargauge",
            ),
            panel("Starts", "short", (f"sum by (result, backend) ({start}_count{{{OURS}}})", "{{result}} {{backend}}")),
            panel(
                "Builds by missed key part",
                "short",
                (total("ts_handlers_builds_total", "reason"), "{{reason}}"),
                kind="bargauge",
            ),
            panel(
                *("Hit rate of the store", "percentunit"),
                (
                    f'sum by (model) ({lookups}{{{OURS}, result="hit"}}) / sum by (model) ({lookups}{{{OURS}}})',
                    "{{model}}",
                ),
            ),
            panel(
                *("Failures", "short"),
                (total("ts_handlers_fallbacks_total", "model"), "{{model}} fallback"),
                (total("ts_handlers_build_failures_total", "model"), "{{model}} build failed"),
                (total("ts_handlers_start_failures_total", "model"), "{{model}} start failed"),
                (total("ts_handlers_background_failures_total", "model"), "{{model}} background build failed"),
                (total("ts_handlers_corrupt_entries_total", "model"), "{{model}} damaged entry"),
                (total("ts_handlers_publish_failures_total", "model"), "{{model}} not published"),
            ),
            panel(
                *("Quarantine", "short"),
                ("ts_handlers_store_quarantined", "on record"),
                (total("ts_handlers_quarantine_refusals_total", "model"), "{{model}} refused"),
            ),
            panel(
                *("Remote store", "ops"),
                (total("ts_handlers_remote_reads_total", "result", window=RATE, how="rate"), "read: {{result}}"),
                (total("ts_handlers_remote_writes_total", "result", window=RATE, how="rate"), "write: {{result}}"),
                (total("ts_handlers_remote_failures_total", "job", window=RATE, how="rate"), "no answer"),
                (total("ts_handlers_remote_refusals_total", "job", window=RATE, how="rate"), "refused objects"),
            ),
            panel(
                "Store: size", "bytes", ("ts_handlers_store_bytes", "entries"), ("ts_handlers_store_free_bytes", "free")
            ),
            panel(
                "Store: entries",
                "short",
                ("ts_handlers_store_entries", "entries"),
                ("ts_handlers_store_damaged_entries", "damaged"),
                (total("ts_handlers_evictions_total", "job"), "evicted"),
            ),
            panel("What is served", "short", (f"ts_handlers_artifact_info{{{OURS}}}", ""), kind="table"),
        ],
    )


def serving() -> dict[str, Any]:
    """What happens to requests."""
    return dashboard(
        "ts-handlers-serving",
        "ts-handlers: serving",
        [
            panel(
                "Duration of a batch in the handler", "s", *quantiles("ts_handlers_batch_seconds", "model", "{{model}}")
            ),
            panel(
                *("Latency and queueing in TorchServe, mean", "s"),
                (
                    of_torchserve("ts_inference_latency_microseconds"),
                    "{{model_name}} latency",
                ),
                (
                    of_torchserve("ts_queue_latency_microseconds"),
                    "{{model_name}} queue",
                ),
            ),
            panel(
                "Requests",
                "reqps",
                (total("ts_handlers_requests_total", "model", window=RATE, how="rate"), "{{model}}"),
            ),
            panel(
                "Failed requests by kind",
                "reqps",
                (
                    total("ts_handlers_request_errors_total", "model, kind", window=RATE, how="rate"),
                    "{{model}} {{kind}}",
                ),
                stacked=True,
            ),
            panel(
                "Answers by status",
                "reqps",
                ("sum(rate(Requests2XX[$__rate_interval]))", "2xx"),
                ("sum(rate(Requests4XX[$__rate_interval]))", "4xx"),
            ),
            panel(
                "Workers that work on a batch",
                "short",
                (f"sum by (model) (ts_handlers_batches_in_progress{{{OURS}}})", "{{model}}"),
            ),
            panel(
                *("Execution contexts", "short"),
                (f"sum by (model) (ts_handlers_contexts{{{OURS}}})", "{{model}} there are"),
                (f"sum by (model) (ts_handlers_contexts_most_in_use{{{OURS}}})", "{{model}} most in use"),
            ),
            panel(
                *("Waits for a context", "s"),
                (
                    total("ts_handlers_context_queue_seconds_total", "model", window=RATE, how="rate"),
                    "{{model}} seconds a second",
                ),
                (
                    total("ts_handlers_context_queue_calls_total", "model", window=RATE, how="rate"),
                    "{{model}} waits a second",
                ),
                (
                    total("ts_handlers_context_queue_refusals_total", "model", window=RATE, how="rate"),
                    "{{model}} refusals a second",
                ),
            ),
            panel(
                "Result cache",
                "ops",
                (
                    total("ts_handlers_result_cache_events_total", "model, event", window=RATE, how="rate"),
                    "{{model}} {{event}}",
                ),
            ),
            panel(
                *("Not answered by the artifact", "ops"),
                (total("ts_handlers_outside_eager_calls_total", "model", window=RATE, how="rate"), "{{model}} eager"),
                (
                    total("ts_handlers_compilations_after_ready_total", "model", window=RATE, how="rate"),
                    "{{model}} compiled",
                ),
            ),
            panel("Processor and memory", "percent", ("CPUUtilization", "processor"), ("MemoryUtilization", "memory")),
            panel("GPU utilisation", "percent", ("GPUUtilization", "{{DeviceId}}")),
            panel("GPU memory", "mbytes", ("GPUMemoryUsed", "{{DeviceId}}")),
        ],
    )


def dashboard(uid: str, title: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    """A dashboard with its panels in rows of three."""
    for index, each in enumerate(panels):
        row, column = divmod(index, 24 // WIDTH)
        each["id"] = index + 1
        each["gridPos"] = {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": row * HEIGHT}
    return {
        "uid": uid,
        "title": title,
        "tags": ["ts-handlers"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "model",
                    "type": "query",
                    "label": "Model",
                    "datasource": SOURCE,
                    "query": {"query": "label_values(ts_handlers_model_ready, model)", "refId": "models"},
                    "includeAll": True,
                    "multi": True,
                    "allValue": ".*",
                    "refresh": 2,
                },
            ]
        },
        "annotations": {"list": []},
        "panels": panels,
    }


def main() -> int:
    """Write or check both files."""
    wrong = []
    for name, made in (("cold-starts", cold_starts()), ("serving", serving())):
        path, text = FOLDER / f"{name}.json", json.dumps(made, indent=2) + "\n"
        if "--check" not in sys.argv[1:]:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            wrong.append(path)
    for path in wrong:
        print(f"{path} is not what {Path(__file__).name} writes; run it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
