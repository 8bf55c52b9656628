"""Comparing what an artifact answers with what the eager model answers, and how much they may differ.

A `Case` is an input with the eager model's answer, made by `eager_case`. A build compares at the ends of its ranges and
forgets the cases (`compare_sizes`); the canary keeps them in the store, and compares every later load with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.backends.eager import eager_run
from ts_handlers.errors import BuildError, CanaryError, InputError, one_line
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.model.signature import Signature, Sizes
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


@dataclasses.dataclass(frozen=True)
class Case:
    """An input, and what the eager model answers to it.

    Attributes
    ----------
    sizes:
        The sizes of the dynamic dimensions.
    inputs:
        The tensors in declared order, on the CPU.
    outputs:
        The tensors of the answer as `ts_handlers.model.structure.flatten` gives them, on the CPU.
    constants:
        The numbers and texts of the answer, as `ts_handlers.model.structure.constants_of` gives them.
    """

    sizes: Sizes
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    constants: list[str]


def copies(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The tensors as a run's own, on `device`: a model may change its inputs in place."""
    return [tensor.to(device, copy=True) for tensor in tensors]


def eager_case(eager: Run, signature: Signature, sizes: Sizes, seed: int, device: torch.device) -> Case:
    """Draw an input of these sizes and ask the eager model, which is on `device`."""
    return case_of(eager, sizes, signature.generate(sizes, seed=seed), device)


def case_of(eager: Run, sizes: Sizes, inputs: list[torch.Tensor], device: torch.device) -> Case:
    """Ask the eager model, which is on `device`, about inputs that are on the CPU."""
    outputs, structure = flatten(eager(copies(inputs, device)))
    kept = [tensor.detach().cpu().clone() for tensor in outputs]  # an output may share memory with an input
    return Case(dict(sizes), inputs, kept, constants_of(structure))


def compare_case(run: Run, case: Case, device: torch.device, tolerance: float | None) -> float:
    """Run an artifact on a case's input and compare the answers; returns and raises as `compare_outputs`."""
    leaves, structure = flatten(run(copies(case.inputs, device)))
    _compare_constants(constants_of(structure), case.constants)
    return _compare_tensors(leaves, case.outputs, tolerance)


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
    _compare_constants(constants_of(found_structure), constants_of(structure))
    return _compare_tensors(left, right, tolerance)


def _compare_tensors(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float | None) -> float:
    if len(found) != len(expected):
        raise CanaryError(f"expected {len(expected)} output tensors, found {len(found)}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
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


def _compare_constants(found: list[str], expected: list[str]) -> None:
    """Compare the numbers and texts in two outputs, as `constants_of` gives them.

    A compiled artifact holds these values, and a model may have computed them from weights that have changed since.

    Raises
    ------
    CanaryError
        They differ.
    """
    if found != expected:
        raise CanaryError(f"the output's constants: expected {', '.join(expected)}, found {', '.join(found)}")


def compare_sizes(
    target: Target, loaded: Loaded, wanted: Sequence[Sizes], *, eager: Run | None = None, what: str = "artifact"
) -> None:
    """Compare an artifact that was just built with the eager model at the given sizes.

    Parameters
    ----------
    eager:
        What to compare with; None takes the eager model.
    what:
        The artifact's name in the message.

    Raises
    ------
    BuildError
        With the sizes at which it differs or does not run.
    """
    eager = eager or eager_run(target, loaded.signature.names)
    signature = loaded.signature
    if target.signature is not None and target.signature.names == signature.names:
        signature = signature.with_values_of(target.signature)  # an artifact does not know what the model accepts
    for sizes in wanted:
        case = eager_case(eager, signature, sizes, seed=2, device=target.device)
        try:
            compare_case(loaded.run, case, target.device, target.settings.canary.tolerance)
        except (CanaryError, RuntimeError, InputError) as error:
            raise BuildError(f"at {sizes} the {what} differs from eager: {one_line(error)}") from error
