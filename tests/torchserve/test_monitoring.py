"""Dashboards, progress and errors as clients and operators meet them, on one real TorchServe.

Its store is a copy of the one that the first start filled, with what that start has recorded: the exporter tells of
that cold start as of this warm one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.dashboards import Query, alert_queries, at_rest, panel_queries
from tests.support.torchserve_archives import ROWS, ArchiveFactory
from tests.support.torchserve_records import FirstStart, ServerFactory, copy_store
from ts_handlers.exporter.collecting import Collector
from ts_handlers.exporter.server import ExporterServer
from ts_handlers.metrics import COUNTERS
from ts_handlers.monitoring.catalogue import CACHE
from ts_handlers.servers.torchserve.failures import FAILURES, Failure
from ts_handlers.testing import TorchServe
from ts_handlers.testing.configuration import read_properties

FAILING = """
from ts.utils.util import PredictionException
from ts_handlers import CompiledHandler
from ts_handlers.errors import BusyError


class Handler(CompiledHandler):
    def preprocess(self, data):
        for row in data:
            kind = bytes(self.request_body(row)).decode()
            if kind == "busy":
                raise BusyError("every execution context was in use for 0.1 s")
            if kind == "out_of_memory":
                raise MemoryError
            if kind == "handler":
                raise PredictionException("not today", 418)
            if kind == "internal":
                raise KeyError("x")
        raise ValueError("no number")
"""


SLOW = """
        import os
        import time

        while not os.path.exists(os.environ["LOAD_NOW"]):
            time.sleep(0.05)
        super().__init__()"""


class Running(NamedTuple):
    """A TorchServe with its exporter."""

    server: TorchServe
    exporter: ExporterServer
    store: Path
    load_now: Path

    def exporter_answer(self, path: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.exporter.server_port}{path}", timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())


@pytest.fixture(scope="module")
def running(
    first_start: FirstStart,
    tiny: str,
    archives: ArchiveFactory,
    make_server: ServerFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    plain = (Path(__file__).parent / "tiny" / "handler.py").read_text("utf-8")
    eager = ("backends: [aot_inductor, inductor, eager]", "backends: [eager]")
    archives.tiny("failing", replace={"handler.py": (plain, FAILING), "model-config.yaml": eager})
    archives.tiny("slow", replace={"model.py": ("super().__init__()", SLOW.strip()), "model-config.yaml": eager})
    folder = tmp_path_factory.mktemp("monitored")
    store = copy_store(first_start, folder / "store")
    with (
        make_server([tiny, "failing", "slow"], store, env={"LOAD_NOW": str(folder / "load-now")}) as server,
        ExporterServer(("127.0.0.1", 0), Collector(store)) as exporter,
    ):
        thread = threading.Thread(target=exporter.serve_forever)
        thread.start()
        try:
            server.wait_ready(tiny)
            server.wait_ready("failing")
            yield Running(server, exporter, store, folder / "load-now")
        finally:
            exporter.shutdown()
            thread.join()


def test_progress_and_describe_agree(running: Running, tiny: str) -> None:
    found = running.exporter_answer("/progress")["models"][tiny]
    described = running.server.describe(tiny)["progress"]
    assert (found["state"], found["serving"], found["share"]) == ("ready", True, 1.0)
    assert [described.get(name) for name in ("state", "serving", "share", "phase")] == ["ready", True, 1.0, None]
    assert running.exporter_answer(f"/ready?model={tiny}")["ready"] is True


def test_a_start_is_seen_while_torchserve_is_silent_about_it(running: Running, tiny: str) -> None:
    """The worker is inside `initialize`, where TorchServe cannot ask it."""
    while "slow" not in (models := running.exporter_answer("/progress")["models"]) or models["slow"]["phase"] != "load":
        time.sleep(0.05)
    assert (models["slow"]["state"], models["slow"]["serving"]) == ("starting", False)
    assert running.exporter_answer("/ready")["ready"] is False
    assert running.exporter_answer(f"/ready?model={tiny}")["ready"] is True
    running.load_now.touch()
    running.server.wait_ready("slow")
    assert running.exporter_answer("/ready")["ready"] is True


def test_what_torchserve_answers_itself(running: Running) -> None:
    assert running.server.predict("nobody", b"x").status == 404
    grpc = pytest.importorskip("grpc", reason="the package grpcio is not installed")
    with pytest.raises(grpc.RpcError) as raised:
        _predict_by_grpc(grpc, running.server, "nobody", b"x")
    error: Any = raised.value
    assert error.code().name == "INTERNAL"


def test_the_exporter_tells_of_the_cold_start_and_of_the_warm_one(running: Running, tiny: str) -> None:
    series = running.exporter._collector.series()
    starts = {labels: sum(numbers[:-1]) for (name, labels), numbers in series.items() if name == "start_seconds"}
    assert (starts[tiny, "aot_inductor", "built"], starts[tiny, "aot_inductor", "hit"]) == (1, 1)
    assert series["builds_total", (tiny, "none")] == [1.0]
    assert series["store_entries", ()][0] >= 1
    phases = {labels[1] for name, labels in series if name == "build_phase_seconds"}
    assert {"export", "compile"} <= phases


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.kind)
def test_a_client_is_told_what_the_table_says_over_http(running: Running, failure: Failure) -> None:
    answer = running.server.predict("failing", failure.kind.encode())
    assert answer.status == (418 if failure.status is None else failure.status), answer.text
    body = answer.json()
    assert body["code"] == answer.status
    assert body["type"] == failure.type
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.kind)
def test_a_client_is_told_what_the_table_says_over_grpc(running: Running, failure: Failure) -> None:
    grpc = pytest.importorskip("grpc", reason="the package grpcio is not installed")
    with pytest.raises(grpc.RpcError) as raised:
        _predict_by_grpc(grpc, running.server, "failing", failure.kind.encode())
    error: Any = raised.value
    assert error.code().name == (failure.grpc or "FAILED_PRECONDITION"), (error.code(), error.details())
    if failure.type != "InternalServerException":
        body = json.loads(error.details().partition("\n")[0])
        assert (body["code"], body["type"]) == (failure.status, failure.type)


def test_grpc_answers_what_http_answers(running: Running, tiny: str) -> None:
    grpc = pytest.importorskip("grpc", reason="the package grpcio is not installed")
    found = _predict_by_grpc(grpc, running.server, tiny, json.dumps(ROWS).encode())
    assert json.loads(found[found.index(b"[") :]) == running.server.predict(tiny, ROWS).json()


def test_failures_are_counted_once_for_each_request(running: Running) -> None:
    def counted() -> dict[str, float]:
        series = running.exporter._collector.series()
        return {
            labels[1]: numbers[0]
            for (name, labels), numbers in series.items()
            if name == "request_errors_total" and labels[0] == "failing"
        }

    before = counted()
    for failure in FAILURES:
        running.server.predict("failing", failure.kind.encode())
    assert {kind: value - before[kind] for kind, value in counted().items()} == dict.fromkeys(before, 1.0)


def _predict_by_grpc(grpc: Any, server: TorchServe, model: str, body: bytes) -> bytes:
    """TorchServe's ``Predictions``, without the stubs of its protocol: ``{1: model, 3: {"body": bytes}}``."""
    properties = read_properties(Path(server.directory) / "config.properties")
    entry = _field(1, b"body") + _field(2, body)
    message = _field(1, model.encode()) + _field(3, entry)
    with grpc.insecure_channel(f"127.0.0.1:{properties['grpc_inference_port']}") as channel:
        predict = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        answer: bytes = predict(message, timeout=60)
    return answer


def _field(number: int, value: bytes) -> bytes:
    length, sizes = len(value), b""
    while length >= 128:
        sizes += struct.pack("B", length % 128 + 128)
        length //= 128
    return struct.pack("B", number << 3 | 2) + sizes + struct.pack("B", length) + value


class Prometheus(NamedTuple):
    """A Prometheus that scrapes TorchServe and the exporter every second."""

    port: int

    def ask(self, query: str) -> list[Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with opener.open(url, timeout=30) as answer:
            return list(json.loads(answer.read())["data"]["result"])


@pytest.fixture(scope="module")
def prometheus(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on PATH and $PROMETHEUS is not set; Debian has a package of that name")
    folder = tmp_path_factory.mktemp("prometheus")
    theirs = urllib.parse.urlsplit(running.server.url("metrics")).netloc
    jobs = {"torchserve": theirs, "ts_handlers": f"127.0.0.1:{running.exporter.server_port}"}
    config = ["global: {scrape_interval: 1s, scrape_timeout: 1s}", "scrape_configs:"]
    config += [f"- {{job_name: {name}, static_configs: [{{targets: ['{at}']}}]}}" for name, at in jobs.items()]
    (folder / "prometheus.yml").write_text("\n".join(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
                "--web.listen-address=127.0.0.1:0",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while (
                port := re.search(rb'Listening on" address=127\.0\.0\.1:(\d+)', (folder / "log").read_bytes())
            ) is None:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            yield Prometheus(int(port[1]))
        finally:
            process.terminate()
            process.wait()


def test_every_panel_and_alert_finds_its_series(running: Running, prometheus: Prometheus, tiny: str) -> None:
    """GPUs and the result cache are left out where this machine or package has none; so are alerts, which find nothing
    while all is well: their metrics must be there."""
    queries = [query for query in panel_queries() if _can_be_there(query)]
    rest = queries
    for _ in range(120):
        running.server.predict(tiny, ROWS)
        running.server.predict(tiny, b"[]", "application/json")
        rest = [query for query in rest if not prometheus.ask(at_rest(query.expression, "1m"))]
        if not rest:
            break
        time.sleep(1)
    assert rest == []
    print(f"{len(queries)} queries of panels found series")
    for alert in alert_queries():
        assert prometheus.ask(
            re.sub(r"(>|==|>=) [\d.]+", "", alert.expression.partition(" and ")[0].partition("\n")[0])
        )


def _can_be_there(query: Query) -> bool:
    if "GPU" in query.expression:
        import torch

        return torch.cuda.is_available()
    return "result_cache" not in query.expression or any(counter.startswith(CACHE) for counter in COUNTERS)
