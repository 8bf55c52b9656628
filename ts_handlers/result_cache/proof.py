"""Whether a model answers equal calls equally, so that its answers may be kept.

What serves is called twice with one drawn input before requests come. Its answers must be the same to the bit, or,
where the model is declared deterministic, within the canary's tolerance: on a GPU sums may be added in another order
each time. And it must not draw random numbers. What the drawn input does not show stays unseen.

The eager module is not made for that: a warm start does without it, and what serves was compared with it by the canary.
"""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.backends.compare import compare_outputs
from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import CanaryError, WarmStartError, one_line
from ts_handlers.model.sampling import KINDS
from ts_handlers.model.structure import constants_of, flatten
from ts_handlers.result_cache.keys import bytes_of


def reason_against(model: ServedModel, *, declared: bool, tolerance: float | None) -> str | None:
    """Why a model's answers must not be kept; None when nothing was found against it.

    Parameters
    ----------
    declared:
        Whether the settings say that the model is deterministic.
    tolerance:
        Of the canary.
    """
    signature = model.signature
    if not signature.inputs:
        return None
    for kind in (signature.kind,) if signature.kind is not None else KINDS:
        before, signature.kind = signature.kind, kind
        try:
            inputs = signature.generate(signature.example_sizes())
        finally:
            signature.kind = before
        try:
            states = _random_states(model.device)
            first = _answer(model, inputs)
            drawn = any(not torch.equal(a, b) for a, b in zip(states, _random_states(model.device), strict=True))
            second = _answer(model, inputs)
        except Exception as error:  # whatever the model raises for what was drawn
            problem = f"it does not answer a drawn input: {type(error).__name__}: {one_line(error, 200)}"
            continue
        if drawn:
            return "the model draws random numbers, so that equal calls need not have equal answers"
        return _difference(first, second, declared, tolerance)
    return f"whether it answers equal calls equally could not be found out: {problem}"


def _answer(model: ServedModel, inputs: list[torch.Tensor]) -> Any:
    with torch.inference_mode():
        leaves, structure = flatten(model(*[tensor.clone() for tensor in inputs]))
    return [leaf.detach().cpu().clone() for leaf in leaves], constants_of(structure)


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _difference(first: Any, second: Any, declared: bool, tolerance: float | None) -> str | None:
    if first[1] == second[1] and len(first[0]) == len(second[0]) and all(map(_is_same, first[0], second[0])):
        return None
    if declared:
        try:
            compare_outputs(first[0], second[0], tolerance)
        except (CanaryError, WarmStartError) as error:
            return f"two equal calls had different answers: {one_line(error, 200)}"
        if first[1] == second[1]:
            return None
    hint = "" if declared else "; a model whose last digits vary may be declared with deterministic: true"
    return f"two equal calls had different answers{hint}"


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, other = bytes_of(a), bytes_of(b)
    return one is not None and one == other
