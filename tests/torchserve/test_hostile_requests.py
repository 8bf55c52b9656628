"""Requests that are made to hurt: the worker keeps its process, and the neighbours in the batch get their answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory, expected
from tests.support.torchserve_records import ServerFactory
from ts_handlers.testing import Response, TorchServe

HANDLER = """class Handler(CompiledHandler):
    def preprocess(self, data):
        for row in data:
            body = row.get("body")
            if isinstance(body, dict) and "fault" in body:
                kind = {"key": KeyError, "runtime": RuntimeError, "value": ValueError}[body["fault"]]
                raise kind(body.get("text", "no"))
        return super().preprocess(data)
"""
JSON = "application/json"
BODIES: dict[str, tuple[bytes, str]] = {
    "a long name": (json.dumps({"\u0001" * 400_000: ROWS}).encode(), JSON),
    "surrogates in a name": (json.dumps({"\ud800" * 400_000: ROWS}).encode(), JSON),
    "100,000 names": (json.dumps({f"{number}": 1 for number in range(100_000)}).encode(), JSON),
    "control characters": (json.dumps({"\x1b[2J\r\n[METRICS]Forged.Count:1|#Level:Model": 1}).encode(), JSON),
    "deep": (b"[" * 900 + b"]" * 900, JSON),
    "endless": (b"[" * 1_000_000, "application/octet-stream"),
    "a huge integer": (b"[[1" + b"0" * 400 + b", 0.5, 0, 0]]", JSON),
    "a huger integer": (b"[[1" + b"0" * 1_000_000 + b", 0.5, 0, 0]]", JSON),
    "a long text": (json.dumps({"x": "y" * 6_000_000}).encode(), JSON),
    "an own message": (json.dumps({"fault": "value", "text": "\u0001" * 400_000}).encode(), JSON),
}
FAULTS = {
    "key": (json.dumps({"fault": "key", "text": "y" * 3_000_000}).encode(), JSON),
    "runtime": (json.dumps({"fault": "runtime"}).encode(), JSON),
    "forged": (json.dumps({"fault": "runtime", "text": "a\n[METRICS]Forged.Count:1|#Level:Model"}).encode(), JSON),
}


@pytest.fixture(scope="module")
def server(
    archives: ArchiveFactory, make_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    archives.tiny(
        "hostile",
        replace={
            "model-config.yaml": ("maxBatchDelay: 1\n", "maxBatchDelay: 300\n"),
            "handler.py": ("class Handler(CompiledHandler):\n    pass\n", HANDLER),
        },
    )
    store = tmp_path_factory.mktemp("hostile") / "store"
    with make_server(["hostile"], store, token_auth=True) as running:
        running.wait_ready("hostile")
        yield running


def together(
    server: TorchServe, bad: tuple[bytes, str], headers: Mapping[str, str] | None = None
) -> tuple[list[Response], list[Response]]:
    """Two bad requests and two good ones at once, as many as a batch holds; their answers."""
    barrier = threading.Barrier(4)

    def ask(index: int) -> Response:
        barrier.wait(60)
        if index % 2:
            return server.predict("hostile", ROWS)
        return server.predict("hostile", *bad, headers=headers)

    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, range(4)))
    return answers[::2], answers[1::2]


_making = threading.Lock()


def check_neighbours(answers: list[Response]) -> None:
    with _making:  # making the eager model seeds torch's one generator
        wanted = expected(1, ROWS)
    for answer in answers:
        assert answer.status == 200, answer.text
        assert answer.json() == [pytest.approx(row, abs=1e-5) for row in wanted]


@pytest.mark.parametrize("case", BODIES)
def test_a_refusal_is_short_and_leaves_worker_and_neighbours_alone(server: TorchServe, case: str) -> None:
    pids = server.worker_pids("hostile")
    for _ in range(2):
        refused, good = together(server, BODIES[case])
        for answer in refused:
            assert answer.status == 400, answer.text[:2000]
            assert len(answer.body) < 1024
            assert answer.json()["type"] == "InputError"
        check_neighbours(good)
    assert server.worker_pids("hostile") == pids


@pytest.mark.parametrize("case", FAULTS)
def test_an_error_of_a_handler_fails_its_request_alone(server: TorchServe, case: str) -> None:
    pids = server.worker_pids("hostile")
    alone = server.predict("hostile", *FAULTS[case])
    for _ in range(2):
        failed, good = together(server, FAULTS[case])
        for answer in failed:
            assert (answer.status, answer.json()) == (alone.status, alone.json())
            assert answer.status == 503
            assert len(answer.body) < 1024
        check_neighbours(good)
    assert server.worker_pids("hostile") == pids
    assert "Forged" not in server.metrics()


def test_describe_is_the_management_apis_alone(server: TorchServe) -> None:
    """A prediction with describe's header gets its prediction, and beside predictions describe is answered too."""
    pids = server.worker_pids("hostile")
    for name in ("describe", "Describe"):
        headers = {name: "True", "customized": "true"}
        alone = server.predict("hostile", ROWS, headers=headers)
        check_neighbours([alone])
        empty = server.predict("hostile", b"--x--\r\n", "multipart/form-data; boundary=x", headers=headers)
        assert empty.status == 400
        assert b"counters" not in empty.body
        marked, good = together(server, (json.dumps(ROWS).encode(), JSON), headers)
        check_neighbours(marked + good)

    def ask(index: int) -> None:
        if index % 4:
            check_neighbours([server.predict("hostile", ROWS)])
        else:
            assert server.describe("hostile")["pid"] in pids

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(40)))
    assert server.worker_pids("hostile") == pids


def test_long_headers_are_no_matter(server: TorchServe) -> None:
    pids = server.worker_pids("hostile")
    refused, good = together(server, (b"[[1, 2]]", JSON), {"X-Odd": "\x7f" * 4000, "explain": "x" * 1000})
    assert [answer.status for answer in refused] == [400, 400]
    check_neighbours(good)
    assert server.worker_pids("hostile") == pids
