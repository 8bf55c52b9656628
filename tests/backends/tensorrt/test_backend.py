"""The backend's own decisions, which need neither a GPU nor TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import archive_source, settings_of
from ts_handlers import Settings, parse_settings, start_model
from ts_handlers.backends.base import Target
from ts_handlers.backends.tensorrt.backend import BACKEND
from ts_handlers.backends.tensorrt.profiles import choose_profile, profile_ranges
from ts_handlers.errors import InputError, SettingsError

INPUTS: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"]}],
    "dimensions": {"batch": {"min": 1, "max": 16}, "length": {"min": 1, "max": 128}},
}


def settings(**section: Any) -> Settings:
    return parse_settings({"handler": {"ts_handlers": {**INPUTS, **section}}})


def request_of(archive: Path, **section: Any) -> Target:
    return Target(archive_source(archive), settings(**section), torch.device("cpu"))


def bounds(target: Target) -> list[dict[str, tuple[int, int, int]]]:
    return [{name: (r.min, r.opt, r.max) for name, r in ranges.items()} for ranges in profile_ranges(target)]


def test_warm_up_sizes_get_profiles_of_their_own(archive: Path) -> None:
    warmup = [{"batch": 8, "length": 128}, {"batch": 1}, {"batch": 8, "length": 128}]
    assert bounds(request_of(archive, warmup=warmup)) == [
        {"batch": (8, 8, 8), "length": (128, 128, 128)},
        {"batch": (1, 1, 1), "length": (128, 128, 128)},
        {"batch": (1, 8, 16), "length": (1, 128, 128)},
    ]


def test_declared_ranges_replace_the_default(archive: Path) -> None:
    ranges = [{"batch": {"min": 2, "opt": 4, "max": 8}}]
    found = bounds(request_of(archive, tensorrt={"ranges": ranges}, warmup=[{"batch": 4, "length": 64}]))
    assert found == [{"batch": (2, 4, 8), "length": (1, 64, 128)}]


@pytest.mark.parametrize(
    "section",
    [
        {"tf32": False},
        {"workspace_mb": 5},
        {"optimization_level": 1},
        {"precision": "autocast"},
        {"precision": "int8"},
        {"refit": True},
        {"partial": "module"},
        {"options": {"use_fp32_acc": True}},
        {"ranges": [{"batch": {"min": 1, "opt": 2, "max": 3}}]},
    ],
)
def test_every_setting_that_changes_the_plan_changes_the_options(archive: Path, section: dict[str, Any]) -> None:
    assert BACKEND.options(request_of(archive)) != BACKEND.options(request_of(archive, tensorrt=section))


def test_contexts_do_not_change_the_options(archive: Path) -> None:
    contexts = {"count": 4, "scratch": "shared", "cuda_graphs": True}
    assert BACKEND.options(request_of(archive)) == BACKEND.options(request_of(archive, contexts=contexts))


sizes = st.integers(1, 20)


@given(st.lists(st.tuples(sizes, sizes, sizes).map(sorted), min_size=1, max_size=4), sizes)
def test_a_profile_is_chosen_only_if_it_holds_the_sizes(triples: list[list[int]], batch: int) -> None:
    profiles = [{"batch": list(triple)} for triple in triples]
    holding = [index for index, (low, _, high) in enumerate(triples) if low <= batch <= high]
    if not holding:
        with pytest.raises(InputError, match=r"extend tensorrt\.ranges"):
            choose_profile(profiles, {"batch": batch})
        return
    chosen = choose_profile(profiles, {"batch": batch})
    assert chosen in holding
    width = {index: triples[index][2] - triples[index][0] for index in holding}
    assert width[chosen] == min(width.values())


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"flavour": "rtx"}, ["tensorrt.flavour", "tensorrt_rtx"]),
        ({"ranges": [{"bach": {"min": 1, "opt": 1, "max": 1}}]}, ["tensorrt.ranges[0].bach", "batch"]),
        ({"ranges": [{"batch": {"min": 2, "opt": 1, "max": 3}}]}, ["tensorrt.ranges[0].batch", "min <= opt <= max"]),
        ({"ranges": [{"batch": {"min": 1, "opt": 1, "max": 17}}]}, ["tensorrt.ranges[0].batch", "1..16"]),
        ({"workspace_mb": 0}, ["tensorrt.workspace_mb"]),
        ({"optimization_level": 6}, ["tensorrt.optimization_level", "0 to 5"]),
    ],
)
def test_impossible_settings_are_refused(section: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        settings(tensorrt=section)
    for part in parts:
        assert part in str(error.value)


def test_without_a_gpu_the_next_backend_serves_and_says_why(archive: Path, tmp_path: Path) -> None:
    model = start_model(archive_source(archive), settings_of(store=str(tmp_path / "s"), backends=["tensorrt", "eager"]))
    assert model.outcome.backend == "eager"
    (fallback,) = model.outcome.fallbacks
    assert fallback["backend"] == "tensorrt"
    assert "TensorRT" in fallback["reason"]
    assert model(torch.ones(2, 4)).shape == (2, 3)
