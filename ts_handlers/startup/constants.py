"""Values that an artifact holds beside the archive's weights, compared with the eager model when there are new weights.

A model may compute something from its weights when they are loaded (a buffer in a hook of `load_state_dict`, a number
in an attribute). An artifact holds what that was when it was built. Whoever asks the eager model for its answers has it
at hand: buffers that differ are taken from it and kept in the canary record, for the starts that do not build it. Where
the code itself holds the value, the artifact is not served with these weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ts_handlers.backends.base import Target
from ts_handlers.errors import CanaryError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.module_state import numbers_of


def take_constants(target: Target, loaded: Loaded) -> Tensors:
    """Make an artifact use the eager model's own constants.

    Returns
    -------
    Those that differed from the artifact's, by name, on the CPU.

    Raises
    ------
    CanaryError
        The artifact's code holds a value that is another one with these weights; named.
    """
    held = loaded.held
    if held is None:
        return {}
    module = target.eager()
    state = module.state_dict()
    weights = target.source.weights()
    for name in held.weights:
        if name in state and name in weights and not _equal(state[name], weights[name].to(state[name].dtype)):
            raise CanaryError(f"the model changes the weight {name!r} when it is loaded, and did not at the build")
    for name, stored in held.folded.items():
        value = _find(module, name)
        if value is not None and not _equal(value, stored):
            raise CanaryError(f"{name!r} is another one with these weights, and the compiled code holds the old one")
    before = held.numbers()
    for name, number in (numbers_of(module) if before else {}).items():
        if before.get(name, number) != number:
            raise CanaryError(
                f"the model's attribute {name!r} is {number} with these weights, and the compiled code holds "
                f"{before[name]}"
            )
    changed = {}
    for name, tensor in held.constants.items():
        value = _find(module, name)
        if value is not None and not _equal(value, tensor):
            changed[name] = value.detach().cpu().clone()
    use_constants(loaded, changed)
    return changed


def use_constants(loaded: Loaded, constants: Mapping[str, torch.Tensor]) -> None:
    """Make an artifact use these constants in the place of its own.

    Raises
    ------
    CanaryError
        The artifact has no such constant, or one of another shape or dtype.
    """
    own = {} if loaded.held is None else loaded.held.constants
    for name, value in constants.items():
        tensor = own.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
            found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CanaryError(
                f"the constant {name!r} is {value.dtype} {tuple(value.shape)} with these weights, "
                f"the artifact has {found}"
            )
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(value)


def _find(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A buffer or attribute by its dotted name; None for a constant that stands in the code of `forward`."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
