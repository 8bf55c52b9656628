"""A request that cannot be answered gets a 4xx that says why, and the worker lives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.torchserve_archives import ROWS, TOKENS, ArchiveFactory, expected
from tests.support.torchserve_records import FirstStart, ServerFactory, copy_store
from ts_handlers.testing import TorchServe


@pytest.fixture(scope="module")
def server(
    first_start: FirstStart, tiny: str, make_server: ServerFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    store = copy_store(first_start, tmp_path_factory.mktemp("requests") / "store")
    with make_server([tiny], store) as running:
        running.wait_ready(tiny)
        yield running


BAD = {
    "broken JSON": (b'{"x": [[1, 2', "application/json", "Expecting|delimiter|JSON"),
    "broken JSON as bytes": (b'{"x": [[1, 2', "application/octet-stream", "Expecting|delimiter|JSON"),
    "not UTF-8": (b"[1, \x80]", "application/octet-stream", "decode|utf"),
    "empty body": (b"", "application/json", "body"),
    "no row": (b"[]", "application/json", "x"),
    "wrong width": (b"[[1, 2, 3]]", "application/json", "x"),
    "too deep": (b"[[[1, 2, 3, 4]]]", "application/json", "x"),
    "too many rows": (str([[0, 0, 0, 0]] * 17).encode(), "application/json", "16"),
    "ragged": (b"[[1, 2, 3, 4], [1]]", "application/json", "x"),
    "words": (b'[["a", "b", "c", "d"]]', "application/json", "x"),
    "null": (b"null", "application/json", "."),
    "number": (b"3", "application/json", "x"),
    "unknown name": (b'{"y": [[1, 2, 3, 4]]}', "application/json", "y"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_the_reason(server: TorchServe, tiny: str, case: str) -> None:
    body, content_type, reason = BAD[case]
    pids = server.worker_pids(tiny)
    answer = server.predict(tiny, body, content_type)
    assert answer.status == 400, answer.text
    assert answer.json()["code"] == 400
    assert re.search(reason, answer.json()["message"]), answer.text
    good = server.predict(tiny, ROWS)
    assert good.json() == [pytest.approx(right, abs=1e-6) for right in expected(1, ROWS)]
    assert server.worker_pids(tiny) == pids


def test_bad_requests_do_not_hurt_others_of_their_batch(server: TorchServe, tiny: str) -> None:
    pids = server.worker_pids(tiny)
    right = [pytest.approx(row, abs=1e-6) for row in expected(1, ROWS)]
    bodies = [b"[[1, 2, 3, 4", b"[[1, 2]]", None, None] * 8
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda body: server.predict(tiny, ROWS if body is None else body, "application/json"), bodies)
        )
    for body, answer in zip(bodies, answers, strict=True):
        if body is None:
            assert answer.status == 200, answer.text
            assert answer.json() == right
        else:
            assert answer.status == 400, answer.text
    assert server.worker_pids(tiny) == pids


def test_a_token_id_that_is_out_of_range_does_not_end_the_worker(
    archives: ArchiveFactory, make_server: ServerFactory, tmp_path: Path
) -> None:
    """Compiled code does end the process there; beside others of a batch, and at the next start from the store, too."""
    archives.tokens("tokens")
    good = [[7] * 127 + [29]]
    right = [pytest.approx(row, rel=1e-4) for row in expected(1, good, TOKENS)]
    for result in ("built", "hit"):
        with make_server(["tokens"], tmp_path / "store") as server:
            server.wait_ready("tokens")
            description = server.describe("tokens")
            assert (description["backend"], description["result"]) == ("aot_inductor", result)
            pids = server.worker_pids("tokens")
            bodies = [good, [[7] * 127 + [30]], [[-1] * 128], good] * 4
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda body: server.predict("tokens", body), bodies))
            for body, answer in zip(bodies, answers, strict=True):
                if body is good:
                    assert (answer.status, answer.json()) == (200, right)
                else:
                    assert answer.status == 400, answer.text
                    found = f"input 'ids': expected values inside its limits [0, 30), found {body[0][-1]};"
                    assert found in answer.json()["message"]
            assert server.worker_pids("tokens") == pids
            assert server.describe("tokens")["pid"] in pids
