"""Comparing what an artifact answers with what the eager model answers, and how much they may differ.

`compare_sizes` compares a new artifact with the eager model at several sizes; `compare_outputs` compares two
outputs that are already there, such as an artifact's and the recorded one of a canary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import BuildError, CanaryError, InputError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import Sizes
from ts_handlers.model.structure import constants_of, flatten

# Largest accepted relative error, ||artifact - eager|| / ||eager||, by dtype of the output. Compiled float32 differs
# from eager in its last digits on the CPU and by far more where TF32 is on; half precision by 1e-3 (ResNet-50 in fp16,
# benchmarks/results/2026-11-26-h200-tensorrt-contexts-resnet50.json).
TOLERANCES = {
    torch.float64: 1e-7,
    torch.float32: 2e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


INTEGER_TOLERANCE = 0.0


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, computed in float64; NaN where only one of them is NaN."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), a - b)
    reference = torch.where(b.isfinite(), b, torch.zeros_like(b))
    norm = float(reference.norm())
    error = float(difference.norm())
    return error / norm if norm > 0 else error


def compare_outputs(found: Any, expected: Any, tolerance: float | None = None) -> float:
    """Compare two outputs of a model, tensor by tensor, and their constants.

    Parameters
    ----------
    tolerance:
        Largest accepted relative error of floating-point outputs; None takes `TOLERANCES`. Integer and boolean outputs
        must be equal.

    Returns
    -------
    The largest relative error.

    Raises
    ------
    CanaryError
        With the first tensor that differs and by how much.
    """
    (left, found_structure), (right, structure) = flatten(found), flatten(expected)
    compare_constants(constants_of(found_structure), constants_of(structure))
    if len(left) != len(right):
        raise CanaryError(f"expected {len(right)} output tensors, found {len(left)}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CanaryError(f"output {index}: expected {b.dtype} {tuple(b.shape)}, found {a.dtype} {tuple(a.shape)}")
        if not a.numel():
            continue
        if b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        limit = INTEGER_TOLERANCE
        if b.is_floating_point():
            limit = TOLERANCES.get(b.dtype, 5e-2) if tolerance is None else tolerance
        error = relative_error(a, b)
        if not error <= limit:  # also catches NaN
            raise CanaryError(f"output {index}: relative error {error:.3g} against eager, at most {limit:.3g} accepted")
        worst = max(worst, error)
    return worst


def compare_constants(found: list[str], expected: list[str]) -> None:
    """Compare the numbers and texts in two outputs, as `constants_of` gives them.

    A compiled artifact holds these values, and a model may have computed them from weights that have changed since.

    Raises
    ------
    CanaryError
        They differ.
    """
    if found != expected:
        raise CanaryError(f"the output's constants: expected {', '.join(expected)}, found {', '.join(found)}")


def compare_sizes(target: Target, loaded: Loaded, cases: Sequence[Sizes]) -> None:
    """Compare an artifact that was just built with the eager model at the given sizes.

    Raises
    ------
    BuildError
        With the sizes at which it differs or does not run.
    """
    eager = eager_run(target, loaded.signature.names)
    for sizes in cases:
        tensors = [tensor.to(target.device) for tensor in loaded.signature.generate(sizes, seed=2)]
        expected = eager(tensors)
        try:
            compare_outputs(loaded.run(tensors), expected, target.settings.canary.tolerance)
        except (CanaryError, RuntimeError, InputError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise BuildError(f"at {sizes} the artifact differs from eager: {reason[:300]}") from error
