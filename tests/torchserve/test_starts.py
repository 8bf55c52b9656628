"""Cold start, restart, several workers, scale-out, several models and versions, on a real TorchServe."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from tests.support.torchserve_archives import ROWS, ArchiveFactory, expected, load_script
from tests.support.torchserve_records import FirstStart, ServerFactory, published, starts

CONFIG = Path(__file__).parents[2] / "config.properties"


def test_cold_start_builds_once(first_start: FirstStart) -> None:
    assert first_start.description["backend"] == "aot_inductor", first_start.description["fallbacks"]
    assert first_start.description["result"] == "built"
    assert first_start.description["counters"]["build"] == 1
    assert first_start.entries == 1
    assert [start["result"] for start in first_start.starts] == ["built"]
    for row, right in zip(first_start.answer, expected(1, ROWS), strict=True):
        assert row == pytest.approx(right, abs=1e-6)


def test_restart_loads(first_start: FirstStart, tiny: str, warm_store: Path, make_server: ServerFactory) -> None:
    with make_server([tiny], warm_store) as server:
        server.wait_ready(tiny)
        description = server.describe(tiny)
        assert server.predict(tiny, ROWS).json() == first_start.answer
        for count in (1, 3, 16):
            rows = [[float(i), 1.0, -1.0, 0.5] for i in range(count)]
            answers = server.predict(tiny, rows).json()
            assert answers == [pytest.approx(right, abs=1e-6) for right in expected(1, rows)]
        after = server.describe(tiny)
    assert description["result"] == "hit"
    assert description["key"] == first_start.description["key"]
    assert (description["counters"]["build"], description["counters"]["hit"]) == (0, 1)
    assert after["counters"]["compile_after_ready"] == 0
    assert after["graphs_in_process"] == 0
    assert len(published(warm_store)) == 1


def test_phases_of_a_start_and_later_counts_are_described_and_metrics(
    archives: ArchiveFactory, tmp_path: Path, warm_store: Path, make_server: ServerFactory
) -> None:
    """The store holds an entry that an earlier start could not send; a thread of this start does."""
    phases = {"process", "key", "lookup", "load", "canary", "warmup"}
    remote = f"remote: {{url: 'file://{tmp_path}/remote', timeout_seconds: 60}}\n    backends:"
    (tmp_path / "remote").mkdir()
    archives.tiny("counted", replace={"model-config.yaml": ("backends:", remote)})
    (warm_store / "entries" / "tiny").rename(warm_store / "entries" / "counted")
    (manifest,) = published(warm_store)
    (warm_store / "remote").mkdir(mode=0o700)
    (warm_store / "remote" / f"unsent-{manifest.parent.name}").touch(mode=0o600)
    with make_server(["counted"], warm_store, config=CONFIG) as server:
        server.wait_ready("counted")
        assert phases <= set(server.describe("counted")["phases_ms"])
        # Metrics reach TorchServe with the log lines of the worker's requests.
        assert server.predict("counted", b"[]", "application/json").status == 400
        counted: dict[str, str | None] = {}
        for _ in range(300):
            server.predict("counted", ROWS)
            metrics = server.metrics()
            counted.update(re.findall(r"^ts_handlers_(\w+)_total\{[^}]*\} (\S+)$", metrics, re.MULTILINE))
            if counted.get("write_back") == "2.0":  # the canary record and the entry
                break
            time.sleep(0.1)
    assert {name for name in phases if f"ts_handlers_{name}_ms{{" in metrics} == phases
    assert {name: counted.get(name) for name in ("hit", "refused", "write_back")} == {
        "hit": "1.0",
        "refused": "1.0",
        "write_back": "2.0",
    }


def test_four_workers_on_an_empty_store_build_once(
    archives: ArchiveFactory, tmp_path: Path, make_server: ServerFactory
) -> None:
    archives.tiny("four", replace={"model-config.yaml": ("minWorkers: 1", "minWorkers: 4")})
    store = tmp_path / "store"
    with make_server(["four"], store) as server:
        server.wait_ready("four", workers=4)
        results = sorted(start["result"] for start in starts(server, "four"))
        assert len(set(server.worker_pids("four"))) == 4
        assert server.predict("four", ROWS).status == 200
    assert len(results) == 4
    assert results.count("built") == 1
    assert set(results) <= {"built", "waited", "hit"}
    assert len(published(store)) == 1


def test_scale_out_builds_nothing(tiny: str, warm_store: Path, make_server: ServerFactory) -> None:
    with make_server([tiny], warm_store) as server:
        server.wait_ready(tiny)
        server.scale(tiny, 3)
        assert len(set(server.worker_pids(tiny))) == 3
        assert [start["result"] for start in starts(server, tiny)] == ["hit"] * 3
        server.scale(tiny, 1)
        assert server.predict(tiny, ROWS).status == 200
    assert len(published(warm_store)) == 1


def test_two_versions_share_the_artifact_and_keep_their_weights(
    archives: ArchiveFactory, tiny: str, warm_store: Path, make_server: ServerFactory
) -> None:
    archives.tiny("tiny", seed=2, version="2.0", file_name="tiny_v2")
    with make_server([tiny], warm_store, model_api=True) as server:
        server.wait_ready(tiny)
        server.register("tiny_v2.mar")
        server.wait_ready(tiny, version="2.0")
        first, second = server.describe(tiny, "1.0"), server.describe(tiny, "2.0")
        for _ in range(3):
            for version, seed in (("1.0", 1), ("2.0", 2)):
                answers = server.predict(tiny, ROWS, version=version).json()
                assert answers == [pytest.approx(right, abs=1e-6) for right in expected(seed, ROWS)]
    assert first["key"] == second["key"]
    assert second["result"] == "hit"
    assert second["counters"]["build"] == 0
    # New weights are compared with the eager model once, the known ones are not.
    assert second["counters"]["canary_recorded"] == 1
    assert first["counters"]["canary_recorded"] == 0
    assert len(published(warm_store)) == 1


def test_two_models_side_by_side(
    archives: ArchiveFactory, tiny: str, warm_store: Path, make_server: ServerFactory
) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn makes the digits archive")
    image_module = pytest.importorskip("PIL.Image", reason="Pillow makes the PNG")
    load_script("build_archives").build("digits", archives.model_store)
    digits = sklearn_datasets.load_digits()
    with make_server([tiny, "digits"], warm_store) as server:
        server.wait_ready("digits")
        server.wait_ready(tiny)
        right = 0
        for pixels, target in zip(digits.images[:20], digits.target[:20], strict=True):
            stream = io.BytesIO()
            image_module.fromarray((pixels / 16 * 255).round().astype("uint8")).save(stream, "PNG")
            answer = server.predict("digits", stream.getvalue()).json()
            assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-4)
            right += answer["class"] == target
        assert right >= 18
        bad = server.predict("digits", b"no image")
        assert (bad.status, bad.json()["type"]) == (400, "InputError")
        assert server.describe(tiny)["counters"]["build"] == 0
        assert server.describe("digits")["counters"]["build"] == 1
        assert server.predict(tiny, ROWS).status == 200
    assert len(published(warm_store)) == 2
