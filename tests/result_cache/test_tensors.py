"""``on: tensors``: answers of a model's calls, and of single rows of a batch."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR_SECTION, eager_model, write_archive
from ts_handlers import ArchiveSource, parse_settings
from ts_handlers.compiled_model import CompiledModel
from ts_handlers.errors import InputError
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.tensors import TensorResults
from ts_handlers.start import start_model

pytestmark = pytest.mark.usefixtures("backend")


class Served:
    """A model with a cache, and the rows of each run of its artifact."""

    def __init__(self, archive: Path, store: Path, *, rows: bool, **section: Any) -> None:
        settings = parse_settings(
            {
                "handler": {
                    "ts_handlers": {
                        **LINEAR_SECTION,
                        "store": str(store),
                        "backends": ["aot_inductor", "eager"],
                        **section,
                    }
                }
            }
        )
        model = start_model(ArchiveSource("model", archive, "model.py", "model.pt"), settings)
        assert isinstance(model, CompiledModel)
        self.model = model
        self.model.outcome = _with_rows(self.model.outcome, rows)
        self.eager = eager_model(archive)
        self.runs: list[int] = []
        self.before_run: Callable[[], None] = lambda: None
        self._count_runs()
        self.cache = ResultCache(1 << 20, 60.0, 120.0, self.model.metrics.count)
        TensorResults(self.model, self.cache, b"prefix").attach()

    def _count_runs(self) -> None:
        loaded = self.model._loaded

        def run(tensors: list[torch.Tensor]) -> Any:
            self.runs.append(len(tensors[0]))
            self.before_run()
            return loaded.run(tensors)

        self.model._loaded = dataclasses.replace(loaded, run=run)

    def check(self, x: torch.Tensor) -> None:
        found = self.model(x)
        with torch.no_grad():
            assert torch.allclose(found, self.eager(x), atol=1e-6)
        assert found.device == x.device

    def counted(self, name: str) -> int:
        return self.model.metrics.counters[f"result_cache_{name}"]


def _with_rows(outcome: Any, rows: bool) -> Any:
    return dataclasses.replace(outcome, independent_rows=rows)


@pytest.fixture
def make(archive: Path, tmp_path: Path) -> Callable[..., Served]:
    return lambda rows=True, **section: Served(archive, tmp_path / "store", rows=rows, **section)


def test_equal_calls_run_once_whatever_form_they_have(make: Callable[..., Served]) -> None:
    served, x = make(), torch.randn(1, 4)
    served.check(x)
    served.check(x.clone())
    assert torch.equal(served.model(x=x), served.model(x))
    assert served.runs == [1]
    assert (served.counted("miss"), served.counted("hit")) == (1, 3)


def test_of_a_batch_with_independent_rows_the_new_ones_run_once_together(make: Callable[..., Served]) -> None:
    served = make()
    a, b, c = (torch.randn(1, 4) for _ in range(3))
    served.check(torch.cat([a, b]))
    served.check(torch.cat([b, c, a, c]))
    served.check(torch.cat([c, b, a]))
    served.check(a)
    assert served.runs == [2, 1]
    assert (served.counted("miss"), served.counted("hit"), served.counted("coalesced")) == (3, 6, 1)


def test_where_an_artifact_does_not_take_so_few_rows_the_whole_batch_runs(make: Callable[..., Served]) -> None:
    served = make()
    a, b, c = (torch.randn(1, 4) for _ in range(3))
    served.check(torch.cat([a, a]))

    def refuse() -> None:
        if served.runs[-1] in (1, 2):
            raise InputError("expected 3 rows")

    served.before_run = refuse
    served.check(torch.cat([b, a, c]))
    served.check(torch.cat([c, b, a]))
    assert served.runs == [1, 2, 3]
    assert served.model.metrics.counters["refused"] == 0


def test_an_answer_without_a_row_for_each_row_is_that_of_its_batch_alone(make: Callable[..., Served]) -> None:
    served = make()
    rows = torch.randn(3, 4)
    loaded = served.model._loaded
    served.model._loaded = dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors).sum(0, keepdim=True))
    for x in (rows, rows, rows[:2]):
        with torch.no_grad():
            assert torch.allclose(served.model(x), served.eager(x).sum(0, keepdim=True), atol=1e-5)
    assert served.cache.stats().entries == 0


def test_rows_that_are_not_independent_are_answered_as_a_batch(make: Callable[..., Served]) -> None:
    served = make(rows=False)
    x = torch.randn(3, 4)
    served.check(x)
    served.check(x)
    served.check(x[:2])
    assert served.runs == [3, 2]


def test_who_changes_an_answer_does_not_change_what_is_stored(make: Callable[..., Served]) -> None:
    served = make()
    for x in (torch.randn(1, 4), torch.randn(3, 4)):
        for _ in range(3):
            served.check(x)
            served.model(x).zero_()
    assert served.runs == [1, 3]


def test_what_is_refused_or_answered_by_eager_is_not_kept(make: Callable[..., Served]) -> None:
    served = make(outside="eager")
    x = torch.randn(20, 4)
    for _ in range(2):
        served.check(x)
    assert served.runs == []
    assert (served.model.metrics.counters["outside_eager"], served.cache.stats().entries) == (2, 0)


def test_a_swap_empties_the_cache_and_calls_that_run_store_nothing_new(make: Callable[..., Served]) -> None:
    served, x = make(), torch.randn(1, 4)
    swapped = threading.Event()

    def swap() -> None:
        if not swapped.is_set():
            swapped.set()
            served.model.return_to_eager("as a test wants it")

    served.before_run = swap
    served.check(x)  # swapped in the middle
    assert served.runs == [1]
    served.check(x)
    assert served.counted("miss") == 2
    served.check(x)
    assert served.counted("hit") == 1


class Swapping:
    """What a model is swapped for; reading what it has loaded lets calls come in between."""

    def __init__(self, other: CompiledModel, call: Callable[[], Any]) -> None:
        self._other, self._call = other, call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._other, name)
        self._call()
        return value


def test_a_call_in_the_middle_of_a_swap_is_not_kept_as_what_comes_after_it(
    make: Callable[..., Served], tmp_path: Path
) -> None:
    served, x = make(), torch.randn(1, 4)
    served.check(x)
    weights = write_archive(tmp_path / "other", seed=2)
    other = Served(weights, tmp_path / "store", rows=True)
    swapping: Any = Swapping(other.model, lambda: served.model(x))
    served.model.swap(swapping)
    with torch.no_grad():
        assert torch.allclose(served.model(x), other.eager(x), atol=1e-6)
        assert not torch.allclose(other.eager(x), served.eager(x), atol=1e-3)


def test_an_error_is_raised_and_not_kept(make: Callable[..., Served]) -> None:
    served, x = make(), torch.randn(2, 4)

    def fail() -> None:
        raise ValueError("broken")

    served.before_run = fail
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            served.model(x)
    served.before_run = lambda: None
    served.check(x)
    assert served.runs == [2, 2, 2]


def test_threads_that_call_with_the_same_rows_get_the_right_answers(make: Callable[..., Served]) -> None:
    served = make()
    rows = torch.randn(6, 4)
    with torch.no_grad():
        wanted = served.eager(rows)
    failures: list[str] = []

    def call(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(100):
            chosen = torch.randint(0, 6, (int(torch.randint(1, 5, (1,), generator=draw)),), generator=draw)
            found = served.model(rows[chosen])
            if not torch.allclose(found, wanted[chosen], atol=1e-6):
                failures.append(str(chosen))
            found.zero_()

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(served.runs) == 6  # each row once
