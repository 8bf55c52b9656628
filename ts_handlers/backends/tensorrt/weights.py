"""New weights for a stored plan: how each of the plan's weights is computed from the archive's.

The build proves these formulas, see `ts_handlers.backends.tensorrt.refit.proof`; a start computes the weights again and
hands them to TensorRT's refitter. Needs torch only.

Format of the part ``refit`` of a description, where the plan takes weights::

    {"flags": names of TensorRT's BuilderFlag,
     "weights": [{"name", "formula", "from": [name in the archive or null], "dtype", and what the formula reads}, ...],
     "state": {name in the archive: {"dtype" in the model, "shape"}},
     "tied": [[names of one tensor], ...],
     "fixed": {name in the archive: digest of the value that the plan holds}}

and where it does not::

    {"refused": why, "weights_digest": of the weights that it holds}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_handlers.backends.base import Description, Target
from ts_handlers.errors import RefitError
from ts_handlers.key import fingerprint
from ts_handlers.model.archive_files import Tensors

WeightFormula = dict[str, Any]
"""One element of ``weights`` above: what a weight of the plan is computed from, and by which of `FORMULAS`."""


def _copy(formula: WeightFormula, sources: Sequence[torch.Tensor | None]) -> torch.Tensor:
    (source,) = sources
    assert source is not None
    return source.t() if formula["transposed"] else source


def _batch_norm_scale(formula: WeightFormula, sources: Sequence[torch.Tensor | None]) -> torch.Tensor:
    weight, variance = _filled(sources, (1.0, 1.0))
    return weight / torch.sqrt(variance + formula["eps"])


def _batch_norm_shift(formula: WeightFormula, sources: Sequence[torch.Tensor | None]) -> torch.Tensor:
    weight, bias, mean, variance = _filled(sources, (1.0, 0.0, 0.0, 1.0))
    return bias - mean * (weight / torch.sqrt(variance + formula["eps"]))


def _filled(sources: Sequence[torch.Tensor | None], neutral: Sequence[float]) -> list[torch.Tensor]:
    """What the layer does not have is filled in as Torch-TensorRT's converter does."""
    size = next(source.shape for source in sources if source is not None)
    return [torch.full(size, n) if s is None else s for s, n in zip(sources, neutral, strict=True)]


# Written as the converters of Torch-TensorRT compute them, rounding included.
FORMULAS: dict[str, Callable[[WeightFormula, Sequence[torch.Tensor | None]], torch.Tensor]] = {
    "copy": _copy,
    "batch_norm_scale": _batch_norm_scale,
    "batch_norm_shift": _batch_norm_shift,
}


def compute(formula: WeightFormula, state: Tensors) -> torch.Tensor:
    """A weight of the plan as a contiguous vector on the CPU.

    Parameters
    ----------
    state:
        The model's state on the CPU, in the model's dtypes.
    """
    sources = [None if name is None else state[name] for name in formula["from"]]
    value = FORMULAS[formula["formula"]](formula, sources)
    return value.to(getattr(torch, formula["dtype"])).contiguous().flatten()


def plan_weights(target: Target, description: Description, state: Tensors | None = None) -> Tensors | None:
    """What the refitter is to be given, by its names; None where the plan holds the weights at hand.

    Parameters
    ----------
    state:
        Values to take instead of the archive's.

    Raises
    ------
    RefitError
        The plan cannot take these weights, with the reason.
    """
    refit = description.get("refit")
    if refit is None:
        return None
    if "refused" in refit:
        if refit["weights_digest"] != target.source.weights_digest():
            raise RefitError(f"the plan cannot take other weights: {refit['refused']}")
        return None
    known = _archive_state(target, refit) if state is None else state
    with torch.no_grad():
        return {formula["name"]: compute(formula, known) for formula in refit["weights"]}


def _archive_state(target: Target, refit: dict[str, Any]) -> Tensors:
    weights = target.source.weights()
    state: Tensors = {}
    for name, spec in refit["state"].items():
        found = weights.get(name)
        if found is None or list(found.shape) != spec["shape"]:
            what = "lack it" if found is None else f"have {list(found.shape)}"
            raise RefitError(f"the plan takes {name!r} of shape {spec['shape']}, the archive's weights {what}")
        state[name] = found.detach().to("cpu", getattr(torch, spec["dtype"]))
    for first, *others in refit["tied"]:
        for other in others:
            if not torch.equal(state[first], state[other]):
                raise RefitError(f"{first!r} and {other!r} are one tensor in the plan, and differ in the archive")
    for name, digest in refit["fixed"].items():
        if name not in weights or value_digest(weights[name]) != digest:
            raise RefitError(f"{name!r} is not a floating-point weight, and differs from what the plan was built with")
    return state


def value_digest(tensor: torch.Tensor) -> str:
    """Digest of a tensor's dtype, shape and values."""
    return fingerprint.digest_tensors({"value": tensor.detach().cpu()})
