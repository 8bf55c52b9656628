"""The exporter's three answers, and its text format."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ts_handlers.exporter.collecting import Collector
from ts_handlers.exporter.server import ExporterServer
from ts_handlers.monitoring.catalogue import FAMILIES
from ts_handlers.monitoring.exposition import exposition
from ts_handlers.monitoring.recorder import ModelRecorder, begin_recording, recorder_of, stop_recording


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[ModelRecorder]:
    stop_recording()
    begin_recording(tmp_path)
    made = recorder_of("resnet")
    assert made is not None
    yield made
    stop_recording()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ExporterServer]:
    with ExporterServer(("127.0.0.1", 0), Collector(tmp_path)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: ExporterServer, path: str) -> tuple[int, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{server.server_port}{path}", timeout=30) as answer:
            status, body = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read().decode()
    return status, body if path.startswith("/metrics") else json.loads(body)


def test_ready_and_progress_follow_a_start(server: ExporterServer, recorder: ModelRecorder) -> None:
    recorder.begin()
    recorder.phase_begins("build")
    recorder.expects(100.0)
    recorder.phase_begins("build: compile")
    assert get(server, "/ready")[0] == 503
    status, found = get(server, "/progress")
    model = found["models"]["resnet"]
    assert status == 200
    assert (model["state"], model["phase"], model["estimate_seconds"]) == ("compiling", "build: compile", 100.0)
    assert 0 <= model["share"] < 0.99
    recorder._progress.serving = True
    recorder._progress.end("ready")
    recorder._write()
    assert get(server, "/ready") == (200, {"ready": True, "models": {"resnet": _state("ready")}})
    assert get(server, "/ready?model=resnet")[0] == 200
    assert get(server, "/ready?model=resnet&model=other")[0] == 503
    assert get(server, "/nonsense")[0] == 404


def _state(state: str) -> dict[str, Any]:
    return {"state": state, "phase": None, "serving": True, "share": 1.0, "estimate_seconds": 100.0}


def test_a_model_is_not_ready_when_nobody_has_started_one(server: ExporterServer) -> None:
    assert get(server, "/ready") == (503, {"ready": False, "models": {}})
    assert get(server, "/progress") == (200, {"models": {}})


def test_a_model_whose_worker_has_died_in_its_start_has_failed(server: ExporterServer, recorder: ModelRecorder) -> None:
    recorder.begin()
    recorder.phase_begins("load")
    stop_recording()  # gives the lock up, as the end of the process does
    for _ in range(2):
        _, found = get(server, "/progress")
        model = found["models"]["resnet"]
        assert (model["state"], model["serving"], model["workers"]) == ("failed", False, [])
        assert model["reason"] == "the process ended in the phase load"


def test_a_model_that_compiles_beside_the_eager_one_serves(server: ExporterServer, recorder: ModelRecorder) -> None:
    recorder._progress.serving = True
    recorder._progress.end("ready")
    recorder.builds_beside("build: export", 12.0)
    status, found = get(server, "/ready")
    assert (status, found["models"]["resnet"]["state"]) == (200, "compiling")


def test_every_metric_has_help_and_type_and_the_ones_of_a_model_have_series(
    server: ExporterServer, recorder: ModelRecorder
) -> None:
    _, text = get(server, "/metrics")
    for family in FAMILIES:
        assert f"# HELP {family.full_name} " in text
        assert f"# TYPE {family.full_name} {family.type}\n" in text
    assert 'ts_handlers_builds_total{model="resnet",reason="weights"} 0\n' in text
    assert re.search(r'^ts_handlers_batch_seconds_bucket\{model="resnet",le="\+Inf"\} 0$', text, re.MULTILINE)
    assert re.search(r"^ts_handlers_store_free_bytes [1-9]", text, re.MULTILINE)


def test_label_values_are_escaped() -> None:
    text = exposition({("swaps_total", ('a"b\\c\nd',)): [1.0]})
    assert 'ts_handlers_swaps_total{model="a\\"b\\\\c\\nd"} 1\n' in text


@pytest.mark.processes
def test_promtool_finds_nothing_to_complain_of(server: ExporterServer, recorder: ModelRecorder) -> None:
    promtool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH and $PROMTOOL is not set; Debian's package prometheus has it")
    recorder.begin()
    with recorder.batch(3):
        pass
    _, text = get(server, "/metrics")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
