"""The ahead-of-time backend on a real GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_values import SECTION as TOKENS_SECTION
from tests.model.test_values import TOKENS
from tests.support.models import (
    LINEAR,
    LINEAR_SECTION,
    archive_source,
    eager_model,
    settings_of,
    write_archive,
    write_weights,
)
from tests.support.subprocesses import run_python
from ts_handlers import InputError, start_model

SYNCHRONISING = LINEAR.replace("return self.layer(x)", "return self.layer(x) + torch.nonzero(x > 0).sum()")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_built_loaded_and_refilled_with_new_weights(tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "archive")
    settings = settings_of({**LINEAR_SECTION, "contexts": {"count": 2}}, store=str(tmp_path / "s"), strict=True)
    results = []
    for seed in (0, 0, 5):
        write_weights(folder, seed)
        model = start_model(archive_source(folder), settings, "cuda:0")
        results.append(model.outcome.result)
        for batch in (1, 3, 8):
            x = torch.randn(batch, 4, device="cuda")
            with torch.inference_mode():
                torch.testing.assert_close(model(x), eager_model(folder).cuda()(x), rtol=1e-3, atol=1e-4)
    assert results == ["built", "hit", "hit"]


def test_cuda_graphs(tmp_path: Path) -> None:
    """Declared sizes are replayed on every context and others run without a graph; answers are those of the weights."""
    folder = write_archive(tmp_path / "archive")
    section = {**LINEAR_SECTION, "contexts": {"count": 3, "cuda_graphs": True}, "warmup": [{"batch": 4}, {"batch": 8}]}
    settings = settings_of(section, store=str(tmp_path / "s"), strict=True, backends=["aot_inductor"])
    for seed in (0, 0, 5):
        write_weights(folder, seed)
        model = start_model(archive_source(folder), settings, "cuda:0")
        eager = eager_model(folder).cuda()
        recorded = model.describe()["artifact"]["cuda_graphs"]
        assert recorded >= 6  # two declared sizes on three contexts, and what the check has run
        memory = model.describe()["artifact"]["gpu_memory"]
        assert 0 < memory["graph_bytes"] < memory["torch_bytes"]

        def wrong(number: int, model: Any = model, eager: Any = eager) -> list[int]:
            torch.manual_seed(number)
            found = []
            with torch.inference_mode():
                for batch in (4, 8, 5, 1, 4, 8) * 20:
                    x = torch.randn(batch, 4, device="cuda")
                    if not torch.allclose(model(x), eager(x), rtol=1e-3, atol=1e-4):
                        found.append(batch)
            return found

        with ThreadPoolExecutor(5) as threads:
            assert list(threads.map(wrong, range(5))) == [[]] * 5
        facts = model.describe()
        assert facts["artifact"]["cuda_graphs"] == recorded
        assert facts["contexts"]["high_water"] <= 3


def test_what_cannot_be_recorded_runs_all_the_same(tmp_path: Path) -> None:
    """`nonzero` waits for the device, which a recording forbids; the process goes on as before."""
    folder = write_archive(tmp_path / "archive", SYNCHRONISING)
    section = {**LINEAR_SECTION, "contexts": {"count": 2, "cuda_graphs": True}, "warmup": [{"batch": 4}]}
    settings = settings_of(section, store=str(tmp_path / "s"), strict=True, backends=["aot_inductor"])
    model = start_model(archive_source(folder), settings, "cuda:0")
    assert model.describe()["artifact"]["cuda_graphs"] == 0
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            before = torch.cuda.memory_allocated()
            torch.randn(1 << 20, device="cuda")
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == before
    with torch.inference_mode():
        for batch in (4, 8, 1):
            x = torch.randn(batch, 4, device="cuda")
            torch.testing.assert_close(model(x), eager_model(folder).cuda()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_index_that_is_out_of_range_is_refused_before_the_device_meets_it(tmp_path: Path, cuda_graphs: bool) -> None:
    """It would be an assertion on the device, after which every call of the process fails."""
    folder = write_archive(tmp_path / "archive", TOKENS)
    section = {**TOKENS_SECTION, "contexts": {"cuda_graphs": cuda_graphs}, "store": str(tmp_path / "s")}
    model = start_model(archive_source(folder), settings_of(section), "cuda:0")
    good = torch.full((2, 128), 29)
    with torch.inference_mode():
        expected = eager_model(folder)(good)
    for device in ("cpu", "cuda"):
        for wrong in (30, -1, 10**9):
            bad = good.clone()
            bad[1, 100] = wrong
            with pytest.raises(InputError, match=f"limits .* found {wrong};"):
                model(bad.to(device))
        torch.cuda.synchronize()
        torch.testing.assert_close(model(good.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_worker_that_has_built_keeps_no_more_memory_than_one_that_finds_the_artifact(
    tmp_path: Path, cuda_graphs: bool
) -> None:
    """One copy of the weights, which are 256 MiB here; what libraries keep for each stream may come on top."""
    wide = LINEAR.replace("Linear(4, 3)", "Linear(8192, 8192)")
    folder = write_archive(tmp_path / "archive", wide)
    section = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 8192]}],
        "dimensions": {"batch": {"min": 1, "max": 8}},
        "contexts": {"count": 1, "cuda_graphs": cuda_graphs},
        "store": str(tmp_path / "s"),
        "backends": ["aot_inductor"],
        "strict": True,
    }
    code = f"""
import torch
from pathlib import Path
from tests.support.models import archive_source, settings_of
from ts_handlers import start_model
model = start_model(archive_source(Path({str(folder)!r})), settings_of({section!r}), "cuda:0")
print("FOUND", model.outcome.result, torch.cuda.memory_reserved() >> 20)
"""
    found = [next(line for line in run_python(code).splitlines() if line.startswith("FOUND")) for _ in range(2)]
    (_, built, after_build), (_, hit, after_hit) = (line.split() for line in found)
    assert (built, hit) == ("built", "hit")
    assert int(after_hit) >= 256
    assert int(after_build) <= int(after_hit) + 128
