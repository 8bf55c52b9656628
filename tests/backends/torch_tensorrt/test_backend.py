"""The backend's own decisions, which need neither a GPU nor TensorRT; tests/rtx has Torch-TensorRT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source
from ts_handlers import parse_settings, start_model
from ts_handlers.backends.base import Target
from ts_handlers.backends.torch_tensorrt.backend import BACKEND, DYNAMIC, RANGES, STATIC, _mark_ranges, _sizes, _ways

SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length", 4]}],
    "dimensions": {"batch": {"min": 1, "max": 16}, "length": {"min": 3, "max": 32}},
    "warmup": [{"batch": 8, "length": 32}],
}


def request_of(archive: Path, compile_section: dict[str, Any] | None = None, **section: Any) -> Target:
    config = {"handler": {"ts_handlers": {**SECTION, **section}}}
    pt2 = {"compile": {"backend": "torch_tensorrt", **(compile_section or {})}}
    return Target(archive_source(archive), parse_settings({**config, "pt2": pt2}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("compile_section", "section"),
    [
        ({"dynamic": True}, {}),
        ({"fullgraph": True}, {}),
        ({"options": {"optimization_level": 1}}, {}),
        ({"options": {"min_block_size": 1}}, {}),
        ({}, {"tensorrt": {"tf32": False}}),
        ({}, {"tensorrt": {"workspace_mb": 5}}),
        ({}, {"warmup": [{"batch": 3}]}),
    ],
)
def test_every_setting_that_changes_an_engine_changes_the_options(
    archive: Path, compile_section: dict[str, Any], section: dict[str, Any]
) -> None:
    assert BACKEND.options(request_of(archive)) != BACKEND.options(request_of(archive, compile_section, **section))


def test_what_concerns_the_plan_or_the_calls_only_does_not_change_the_options(archive: Path) -> None:
    for section in (
        {"contexts": {"count": 4}},
        {"tensorrt": {"partial": "module"}},
        {"tensorrt": {"ranges": [{"batch": {"min": 1, "opt": 2, "max": 4}}]}},
    ):
        assert BACKEND.options(request_of(archive)) == BACKEND.options(request_of(archive, **section))


@pytest.mark.parametrize(("dynamic", "ways"), [(None, [RANGES, STATIC]), (True, [DYNAMIC]), (False, [STATIC])])
def test_dynamic_chooses_how_sizes_are_treated(archive: Path, dynamic: bool | None, ways: list[str]) -> None:
    assert _ways(request_of(archive, {"dynamic": dynamic})) == ways


def test_a_fixed_signature_is_static(archive: Path) -> None:
    inputs = [{"name": "x", "dtype": "float32", "shape": [2, 4]}]
    assert _ways(request_of(archive, inputs=inputs, dimensions={}, warmup=[])) == [STATIC]


def test_ranges_are_seen_at_two_sizes_of_each_dimension(archive: Path) -> None:
    request = request_of(archive)
    sizes = _sizes(request, RANGES)
    for name in ("batch", "length"):
        assert len({one[name] for one in sizes if one[name] > 1}) > 1
    assert all(request.require_signature().dimensions[name].min <= one[name] for one in sizes for name in one)
    assert {"batch": 16, "length": 32} in sizes
    assert {"batch": 8, "length": 3} in sizes
    assert _sizes(request, STATIC) == [{"batch": 8, "length": 32}, {"batch": 1, "length": 32}]


def test_only_sizes_above_one_are_marked_with_their_range(archive: Path) -> None:
    signature = request_of(archive).require_signature()
    (tensor,) = signature.generate({"batch": 1, "length": 7})
    _mark_ranges(signature, [tensor])
    assert tensor._dynamo_dynamic_indices == {1}  # type: ignore[attr-defined]
    (known,) = tensor._dynamo_dynamic_range  # type: ignore[attr-defined]
    assert (known.dim, known.min, known.max) == (1, 3, 32)


def test_without_a_gpu_the_next_backend_serves_and_says_why(archive: Path, tmp_path: Path) -> None:
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    section = {"store": str(tmp_path / "s"), "inputs": inputs, "dimensions": {"batch": {"min": 1, "max": 8}}}
    config = {"handler": {"ts_handlers": section}, "pt2": {"compile": {"backend": "torch_tensorrt"}}}
    model = start_model(archive_source(archive), parse_settings(config))
    assert model.outcome.backend == "eager"
    assert [fallback["backend"] for fallback in model.outcome.fallbacks] == ["tensorrt", "torch_tensorrt"]
    assert all("TensorRT" in fallback["reason"] for fallback in model.outcome.fallbacks)
    assert model(torch.ones(2, 4)).shape == (2, 3)
